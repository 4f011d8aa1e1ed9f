"""Policies: frozen, complete, changed by copies, and clear about what they are and what they were given."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from msamp_like import policy
from msamp_like.formats import BF16, E4M3, E5M2, FORMATS, FP16, FP32, RESIDUAL, WHOLE
from msamp_like.policy import GEMM_ROLES, LEAN, LEVELS, O0, O1, O2, Policy, Role, Rule, resolve

RULES = dict(O2.rules)


def test_levels_are_the_papers():
    """FP8-LM, sections 2.1 to 2.3: what each level adds to the one before it."""
    assert {role: rule.format for role, rule in O1.rules.items()} == {
        Role.INPUT: E4M3, Role.WEIGHT: E4M3, Role.GRAD_OUTPUT: E5M2, Role.GRAD_WEIGHT: E4M3, Role.MASTER_WEIGHT: FP16,
        Role.FIRST_MOMENT: FP32, Role.SECOND_MOMENT: FP32, Role.PARTIAL_OUTPUT: E4M3, Role.SAVED_ACTIVATION: BF16,
    }  # fmt: skip
    changed = {role for role in Role if O1[role] != O2[role]}
    assert changed == {Role.FIRST_MOMENT, Role.SECOND_MOMENT}
    assert (O2[Role.FIRST_MOMENT].format, O2[Role.SECOND_MOMENT].format) == (E4M3, FP16)
    assert not any(rule.format.scaled for rule in O0.rules.values())
    assert [O1[role].history for role in GEMM_ROLES] == [16, 0, 16]  # window 1 for the weight: its own amax


def test_bytes_per_parameter_of_the_levels():
    """What a matrix parameter costs, scales not counted: 16, 11 and 6 bytes (design.md, Levels)."""

    def stored(policy):
        held = {policy.parameter, Role.MASTER_WEIGHT, Role.GRAD_WEIGHT, Role.FIRST_MOMENT, Role.SECOND_MOMENT}
        return sum(policy[role].format.bytes for role in held)

    assert [stored(level) for level in (O0, O1, O2)] == [16, 11, 6]


@pytest.mark.parametrize("level", LEVELS.values(), ids=lambda level: level.name)
class TestLevel:
    def test_is_frozen(self, level):
        with pytest.raises(dataclasses.FrozenInstanceError):
            level.name = "mine"
        with pytest.raises(dataclasses.FrozenInstanceError):
            level[Role.INPUT].history = 3
        with pytest.raises(TypeError):
            level.rules[Role.INPUT] = Rule(format=FP32)

    def test_survives_pickle_and_copy(self, level):
        for again in (pickle.loads(pickle.dumps(level)), copy.deepcopy(level)):
            assert again == level
            assert str(again) == str(level)

    def test_prints_every_role(self, level):
        text = str(level)
        for role in Role:
            (line,) = [line for line in text.splitlines() if line.split()[0] == role.value]
            assert str(level[role]) in line
            assert ("(the parameter)" in line) == (role is level.parameter)
        assert level.name in text
        assert "lm_head" in text

    def test_resolves_by_name_and_by_itself(self, level):
        assert resolve(level.name) is level
        assert resolve(level) is level


def test_a_policys_own_rules_do_not_change_with_the_mapping_it_came_from():
    rules = dict(RULES)
    made = Policy(name="mine", rules=rules)
    rules[Role.INPUT] = Rule(format=FP32)
    assert made[Role.INPUT] == O2[Role.INPUT]


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", E5M2), ("block", (1, 32)), ("history", 4), ("algorithm", "most_recent"), ("margin", 1),
     ("power_of_two", False), ("rounding", "stochastic")],
)  # fmt: skip
def test_every_field_of_a_scaled_rule_is_printed(field, value):
    """A saved state is refused by the printed policy, so two rules that differ must print differently."""
    rule = Rule(format=E4M3, history=0 if field == "block" else 16)
    assert str(dataclasses.replace(rule, **{field: value})) != str(rule)


def test_a_rule_needs_a_format_not_its_name():
    with pytest.raises(TypeError, match="got 'e4m3'; for example E4M3"):
        Rule(format="e4m3")


# --- overrides ------------------------------------------------------------------------------------------------------


def test_the_last_matching_override_wins():
    changed = O2.override({"blocks.*": "bf16"}).override({"blocks.1.*": "fp8", "*.up": "skip"})
    assert changed.product("blocks.0.down") == ("bf16", "blocks.*")
    assert changed.product("blocks.1.down") == ("fp8", "blocks.1.*")
    assert changed.product("blocks.1.up") == ("skip", "*.up")
    assert changed.product("other") == ("fp8", "")
    assert O2.product("blocks.0.down") == ("fp8", "")  # the preset is untouched


@pytest.mark.parametrize("name", ["lm_head", "model.lm_head", "head", "net.head"])
def test_output_heads_stay_in_bf16_until_asked_for(name):
    assert O2.product(name)[0] == "bf16"
    assert O2.override({"*": "fp8"}).product(name)[0] == "fp8"
    assert O2.product(f"{name}.inner")[0] == "fp8"
    assert O2.product("overhead")[0] == "fp8"  # a name that ends alike is another name


def test_bf16_changes_the_operands_of_the_products_and_nothing_else():
    changed = O2.for_module("lm_head")
    assert {role for role in Role if changed[role] != O2[role]} == set(GEMM_ROLES)
    assert all(changed[role].format is BF16 for role in GEMM_ROLES)
    assert (O2.fp8_products, changed.fp8_products) == (True, False)
    assert O2.for_module("other") is O2


def test_with_rule_changes_one_role():
    changed = O2.with_rule("weight", "e5m2")
    assert {role for role in Role if changed[role] != O2[role]} == {Role.WEIGHT}
    assert changed[Role.WEIGHT].format is E5M2
    assert changed.name != O2.name
    assert O2.with_rule(Role.INPUT, Rule(format=FP16))[Role.INPUT].format is FP16


@pytest.mark.parametrize("level", LEVELS.values(), ids=lambda level: level.name)
def test_recipes_say_where_scales_of_activations_come_from(level):
    current, delayed = level.with_recipe("current"), level.with_recipe("delayed")
    assert all(current[role].history == 0 for role in Role)
    expected = 16 if level.fp8_products else 0
    assert [delayed[role].history for role in (Role.INPUT, Role.GRAD_OUTPUT)] == [expected] * 2
    assert delayed == level  # the levels' own


def test_numbers_of_roles_are_fixed():
    """They are part of the random stream of stochastic rounding: a checkpoint continues in it."""
    assert [role.value for role in sorted(Role, key=lambda role: role.index)] == [
        "input", "weight", "grad_output", "grad_weight", "master_weight", "first_moment", "second_moment",
        "partial_output", "saved_activation",
    ]  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: resolve("O9"), "level must be one of O0, O1, O2, O3, lean or a Policy, got 'O9'"),
        (lambda: resolve("o2"), "did you mean 'O2'"),
        (lambda: resolve(None), "got None"),
        (lambda: resolve(["O2"]), "got .*O2"),
        (lambda: O2.with_rule("wieght", "e5m2"), "role must be one of .* did you mean 'weight'"),
        (lambda: O2.with_rule("weight", "e5m4"), "format must be one of .* did you mean 'e5m2'"),
        (lambda: O2.with_recipe("delay"), "recipe must be one of .* did you mean 'delayed'"),
        (lambda: O2.override({"a": "fp16"}), "override of 'a' must be one of .*got 'fp16'"),
        (
            lambda: Policy(name="half", rules={Role.INPUT: Rule(format=E4M3)}),
            "rule for every role, 'half' lacks weight",
        ),
        (lambda: Policy(name="odd", rules=RULES, parameter=Role.INPUT), "its master_weight or its weight, got 'input'"),
        (lambda: O2.with_rule("master_weight", Rule(format=RESIDUAL)), "leaves of its master.*parameter=Role.WEIGHT"),
        (lambda: LEAN.with_rule("weight", Rule(format=RESIDUAL)), "got one for weight where the parameter is"),
        (lambda: O2.with_rule("first_moment", "ue5m3"), "a first_moment has a sign, got ue5m3"),
        (lambda: Rule(format=E4M3, block=(0, 1)), "a block is two sizes"),
        (lambda: Rule(format=E4M3, block=(1, 128), history=16), "a history needs one scale"),
        (lambda: Rule(format=E4M3, history=-1), "a history"),
        (lambda: Rule(format=E4M3, algorithm="mean"), "algorithm must be one of .*'mean'"),
        (lambda: Rule(format=E4M3, rounding="up"), "rounding must be one of .*'up'"),
    ],
)
def test_bad_policies_are_refused_with_rule_value_and_remedy(build, told):
    with pytest.raises(ValueError, match=told):
        build()


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_a_rule_of_any_format_prints_its_format(format):
    assert str(Rule(format=format)).startswith(format.name)
    assert ("scale" in str(Rule(format=format))) == format.scaled
    assert Rule(format=format).block == WHOLE


def test_module_names_match_as_file_names_do():
    assert policy.matches("blocks.10.up", "blocks.1?.up")
    assert not policy.matches("blocks.1.up", "blocks.1?.up")
    assert policy.matches("a.b.c", "a.*")
    assert not policy.matches("A", "a")
