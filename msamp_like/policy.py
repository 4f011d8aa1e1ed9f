"""Which precision each tensor gets: a policy maps a role to a rule.

A level of FP8-LM (Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023, https://arxiv.org/abs/2310.18313) is
one constant below. Nothing in the engine asks which level it runs: it asks the policy for the rule of a role.
"""

from __future__ import annotations

import difflib
import enum
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from msamp_like.formats import (
    BF16,
    E4M3,
    E5M2,
    FNUZ,
    FORMATS,
    FP8_FORMATS,
    FP16,
    FP32,
    RESIDUAL,
    UE5M3,
    WHOLE,
    Block,
    Format,
    check_block,
    check_same_kind,
)
from msamp_like.recipes import RECIPES


class Role(enum.Enum):
    """What a tensor is for."""

    INPUT = "input"
    WEIGHT = "weight"
    GRAD_OUTPUT = "grad_output"
    GRAD_WEIGHT = "grad_weight"
    MASTER_WEIGHT = "master_weight"
    FIRST_MOMENT = "first_moment"
    SECOND_MOMENT = "second_moment"
    PARTIAL_OUTPUT = "partial_output"
    SAVED_ACTIVATION = "saved_activation"

    @property
    def index(self) -> int:
        """Position in the enumeration; part of the random stream of stochastic rounding, so the order never changes."""
        return list(Role).index(self)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the tensors of one role are stored.

    ``history`` 0 takes the scale from the tensor at hand; n > 0 from the amax of the last n steps (delayed scaling),
    either the "max" of them or the "most_recent". ``margin`` keeps that many powers of two free above amax.
    ``rounding`` of an optimizer state is "nearest", "stochastic", or "auto": stochastic exactly where nearest could
    freeze an exponential average, that is where its decay 1 - beta is below half a unit of the format.
    """

    format: Format
    block: Block = WHOLE
    history: int = 0
    algorithm: str = "max"
    margin: int = 0
    power_of_two: bool = True
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise TypeError(f"a rule's format must be one of msamp_like.formats, got {self.format!r}; for example E4M3")
        check_block(self.block)
        if self.history < 0 or (self.history > 0 and self.block != WHOLE):
            raise ValueError(
                f"a history needs one scale for the whole tensor, got history={self.history} with block={self.block}; "
                "use history=0 with blocks"
            )
        if self.block == (1, 32) and not self.power_of_two:
            raise ValueError("1x32 is an MX block, scaled by a power of two, got power_of_two=False; use (1, 128)")
        for name, known in (("algorithm", ("max", "most_recent")), ("rounding", ("nearest", "stochastic", "auto"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    @property
    def one_way(self) -> bool:
        """Whether a product that contracts over the other dim needs scales of its own: a block of one row of 128 has
        one scale along the last dim alone, the whole tensor and a square serve both."""
        return self.format.scaled and self.block[0] != self.block[1]

    def rounds_stochastically(self, beta: float | None = None) -> bool:
        """Whether a state that decays by ``beta`` a step (None: it does not decay) is rounded stochastically."""
        if self.rounding == "auto":
            return beta is not None and 1 - beta < 2.0 ** -(self.format.mantissa_bits + 1)
        return self.rounding == "stochastic"

    def __str__(self) -> str:
        if not self.format.scaled:
            return self.format.name
        rows, columns = self.block
        if self.format == RESIDUAL:
            return f"{self.format.name} of the weight, in 256th parts of its steps, {self.rounding} rounding"
        scope = {(-1, -1): "tensor", (1, -1): "row"}.get(self.block, f"{rows}x{columns}")
        source = f"{self.algorithm} of last {self.history}" if self.history else "this tensor"
        kind = "" if self.power_of_two else ", exact scale"
        margin = f", margin {self.margin}" if self.margin else ""
        rounding = "" if self.rounding == "nearest" else f", {self.rounding} rounding"
        return f"{self.format.name}, scale per {scope} from {source}{kind}{margin}{rounding}"


GEMM_ROLES = (Role.INPUT, Role.WEIGHT, Role.GRAD_OUTPUT)

# Why the output head stays in BF16: its error goes straight into the logits, it is a few per cent of the FLOPs, and
# every recipe that trains at scale keeps it (what FP8 there would cost here is not settled).
DEFAULT_EXCEPTIONS: tuple[tuple[str, str], ...] = tuple(
    (pattern, "bf16") for name in ("lm_head", "head") for pattern in (name, f"*.{name}")
)

_PRODUCTS = {
    "bf16": "the three products in BF16, everything else as the level says",
    "fp8": "the three products in FP8, also where the default keeps BF16",
    "smooth": "the three products in FP8, the input's channels brought to one size first (Smooth-SwiGLU)",
    "skip": "left alone: a plain torch module with FP32 states",
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Role -> Rule, with exceptions by module name.

    ``parameter`` says what the parameter itself holds: the MASTER_WEIGHT (O1, O2: its compute copy is made from it), or
    the WEIGHT that products read, its master kept by the optimizer (O0, and O3 where the owner keeps it). A master of
    format RESIDUAL is what the weight leaves, kept by the optimizer: both together are the master (lean).
    ``zero_stage`` is what data-parallel ranks share out: 0 nothing, 1 optimizer states and masters, 2 gradients too.
    ``exceptions`` are (pattern, product) pairs; a pattern is matched against the module's full name as a shell does,
    the last match wins, and a product is "bf16", "fp8", "smooth" (for the second linear layer of a gated product) or
    "skip".
    """

    name: str
    rules: Mapping[Role, Rule]
    parameter: Role = Role.MASTER_WEIGHT
    zero_stage: int = 0
    exceptions: tuple[tuple[str, str], ...] = field(default=DEFAULT_EXCEPTIONS)

    def __post_init__(self) -> None:
        missing = [role.value for role in Role if role not in self.rules]
        if missing:
            raise ValueError(f"a policy needs a rule for every role, {self.name!r} lacks {', '.join(missing)}")
        if self.parameter not in (Role.MASTER_WEIGHT, Role.WEIGHT):
            raise ValueError(f"a parameter holds its master_weight or its weight, got {self.parameter.value!r}")
        for role in self.rules:
            self._check_format(role)
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(
                f"zero_stage must be 0 (every rank has all states), 1 or 2, got {self.zero_stage!r}; for sharded "
                "parameters, stage 3, see msamp_like.integrations.fsdp2"
            )
        for pattern, product in self.exceptions:
            if product not in _PRODUCTS:
                known = "; ".join(f"{name!r} ({meaning})" for name, meaning in _PRODUCTS.items())
                raise ValueError(f"the override of {pattern!r} must be one of {known}, got {product!r}")
        for role in GEMM_ROLES:
            check_same_kind(self.rules[GEMM_ROLES[0]].format.dtype, self.rules[role].format.dtype)
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))

    def _check_format(self, role: Role) -> None:
        format = self.rules[role].format
        if format == RESIDUAL and (role is not Role.MASTER_WEIGHT or self.parameter is not Role.WEIGHT):
            raise ValueError(
                f"a residual is what a weight leaves of its master, got one for {role.value} where the parameter is "
                f"the {self.parameter.value}; use it for master_weight with parameter=Role.WEIGHT, as level lean does"
            )
        if format == RESIDUAL and self.rules[Role.WEIGHT].block != WHOLE:
            raise ValueError(f"a residual's weight has one scale, got {self.rules[Role.WEIGHT]}; leave its block out")
        if not format.signed and role is not Role.SECOND_MOMENT:
            raise ValueError(f"a {role.value} has a sign, got {format}, which stores none; use e4m3, say")

    def __getitem__(self, role: Role) -> Rule:
        return self.rules[role]

    def __reduce__(self) -> tuple[object, ...]:  # a mapping proxy does not pickle, a policy has to
        return _rebuild, (self.name, dict(self.rules), self.parameter, self.exceptions, self.zero_stage)

    @property
    def parameter_rule(self) -> Rule:
        """The rule of what a matrix parameter holds."""
        return self[self.parameter]

    def master(self, weight: Format) -> Rule:
        """Of a weight of this format; only an 8-bit one can have a residual, any other has O2's master."""
        halved = self[Role.MASTER_WEIGHT].format == RESIDUAL
        return (O2 if halved and weight.bytes > 1 else self)[Role.MASTER_WEIGHT]

    @property
    def fp8_products(self) -> bool:
        """Whether the GEMMs read FP8 operands."""
        return all(self[role].format in FP8_FORMATS for role in GEMM_ROLES)

    def product(self, module_name: str) -> tuple[str, str]:
        """("fp8" | "smooth" | "bf16" | "skip", the pattern that said so or "") for a module."""
        chosen = ("fp8", "")
        for pattern, product in self.exceptions:
            if matches(module_name, pattern):
                chosen = (product, pattern)
        return chosen

    def for_module(self, module_name: str) -> Policy:
        """This policy as it holds for one module: with "bf16", the three operands of its products are BF16."""
        if self.product(module_name)[0] != "bf16":
            return self
        return replace(self, rules={**self.rules, **dict.fromkeys(GEMM_ROLES, Rule(format=BF16))})

    def held(self, module_name: str, *, in_fp8: bool) -> Rule:
        """The rule of what a module's matrix holds: the parameter's, but a weight that no FP8 product reads is BF16
        where the parameter is the WEIGHT itself, for its lookups and BF16 products would see the rounding."""
        if self.parameter is Role.WEIGHT and not in_fp8:
            return Rule(format=BF16)
        return self.for_module(module_name).parameter_rule

    def override(self, overrides: Mapping[str, str]) -> Policy:
        """With more exceptions, each of which wins over those before it: ``override({"lm_head": "fp8"})``."""
        return replace(self, exceptions=(*self.exceptions, *overrides.items()))

    def with_rule(self, role: Role | str, rule: Rule | str) -> Policy:
        """With another rule for one role; a format's name keeps the rest of the rule: ``with_rule("weight",
        "e5m2")``."""
        role = _role(role)
        if isinstance(rule, str):
            if rule not in FORMATS:
                raise ValueError(f"a format must be one of {', '.join(FORMATS)}, got {rule!r}{_nearest(rule, FORMATS)}")
            rule = replace(self[role], format=FORMATS[rule])
        return replace(self, name=f"{self.name}+{role.value}={rule.format}", rules={**self.rules, role: rule})

    def with_recipe(self, recipe: str) -> Policy:
        """With the operands of the products scaled as a named recipe has it, see :data:`RECIPES`; a role that has no
        scale (level O0) stays as it is, and so does a weight that is half of its master, which has one scale."""
        if recipe not in RECIPES:
            raise ValueError(f"a recipe must be one of {', '.join(RECIPES)}, got {recipe!r}{_nearest(recipe, RECIPES)}")
        rules = dict(self.rules)
        for role, block in zip(GEMM_ROLES, RECIPES[recipe].blocks, strict=True):
            if rules[role].format.scaled and (role, rules[Role.MASTER_WEIGHT].format) != (Role.WEIGHT, RESIDUAL):
                history = 0 if role is Role.WEIGHT else RECIPES[recipe].history
                rules[role] = replace(rules[role], block=block, history=history)
        if RECIPES[recipe].narrow_gradients and rules[Role.GRAD_OUTPUT].format.scaled:
            rules[Role.GRAD_OUTPUT] = replace(rules[Role.GRAD_OUTPUT], format=rules[Role.INPUT].format)
        return replace(self, rules=rules)

    def fnuz(self) -> Policy:
        """With AMD's fnuz formats in place of the OCP ones, for devices that multiply those (gfx94x)."""
        rules = {role: replace(rule, format=FNUZ.get(rule.format, rule.format)) for role, rule in self.rules.items()}
        return replace(self, name=f"{self.name}+fnuz", rules=rules)

    def with_saved_activations(self, kind: str) -> Policy:
        """With what norms, activations and elementwise products keep for backward in FP8 groups of 128 ("fp8"), or as
        torch keeps it ("bf16")."""
        if kind not in SAVED_ACTIVATIONS:
            raise ValueError(f"saved activations must be one of {', '.join(SAVED_ACTIVATIONS)}, got {kind!r}")
        return self.with_rule(Role.SAVED_ACTIVATION, SAVED_ACTIVATIONS[kind])

    def __str__(self) -> str:
        held = {self.parameter: "  (the parameter)"}
        lines = [f"policy {self.name}"]
        lines += [f"  {role.value:<17} {rule}{held.get(role, '')}" for role, rule in self.rules.items()]
        lines += [f"  {pattern:<17} products in {product}" for pattern, product in self.exceptions]
        return "\n".join(lines)


_BLOCK: Block = (1, 128)

SAVED_ACTIVATIONS: Mapping[str, Rule] = MappingProxyType(
    {"bf16": Rule(format=BF16), "fp8": Rule(format=E4M3, block=_BLOCK)}
)
"""What ``amp.initialize(saved_activations=...)`` takes, and the rule of SAVED_ACTIVATION that it means."""

O0 = Policy(
    name="O0",
    parameter=Role.WEIGHT,
    rules={
        **dict.fromkeys(Role, Rule(format=BF16)),
        **dict.fromkeys((Role.MASTER_WEIGHT, Role.FIRST_MOMENT, Role.SECOND_MOMENT), Rule(format=FP32)),
    },
)
"""BF16 mixed precision with FP32 states, in the same code: the yardstick."""

O1 = Policy(
    name="O1",
    rules={
        Role.INPUT: Rule(format=E4M3, history=16),
        Role.WEIGHT: Rule(format=E4M3),
        Role.GRAD_OUTPUT: Rule(format=E5M2, history=16),
        Role.GRAD_WEIGHT: Rule(format=E4M3),
        Role.MASTER_WEIGHT: Rule(format=FP16, block=_BLOCK, rounding="stochastic"),
        Role.FIRST_MOMENT: Rule(format=FP32),
        Role.SECOND_MOMENT: Rule(format=FP32),
        Role.PARTIAL_OUTPUT: Rule(format=E4M3, block=_BLOCK),
        Role.SAVED_ACTIVATION: Rule(format=BF16),
    },
)
"""FP8 products and gradients, FP16 master weights with scales; FP32 moments.

The master is rounded stochastically: an update below half a unit of FP16 is kept in the mean, where nearest would lose
it (docs/results/moments.json)."""

O2 = replace(
    O1,
    name="O2",
    rules={
        **O1.rules,
        Role.FIRST_MOMENT: Rule(format=E4M3, block=_BLOCK, rounding="auto"),
        Role.SECOND_MOMENT: Rule(format=FP16, block=_BLOCK, rounding="stochastic"),
    },
)
"""O1 with an E4M3 first and an FP16 second moment, each rounded so that a slow average still moves."""

O3 = replace(
    O2,
    name="O3",
    parameter=Role.WEIGHT,
    zero_stage=1,
)
"""O2 for several processes: the parameter is the E4M3 weight, its FP16 master lives with the rank that owns it, and
what tensor and sequence parallelism exchange is E4M3 in blocks, whose scales travel with the codes."""

LEAN = replace(
    O2,
    name="lean",
    parameter=Role.WEIGHT,
    rules={
        **O2.rules,
        Role.MASTER_WEIGHT: Rule(format=RESIDUAL, rounding="stochastic"),
        Role.SECOND_MOMENT: Rule(format=UE5M3, block=_BLOCK, rounding="stochastic"),
    },
)
"""O2 in five bytes: the E4M3 weight is the upper half of its master, both moments have 8 bits. That of the second has
no sign, its bit goes to the range: E4M3 loses small values to zero, where they divide (numerics.md)."""

LEVELS: Mapping[str, Policy] = MappingProxyType({policy.name: policy for policy in (O0, O1, O2, O3, LEAN)})


def matches(module_name: str, pattern: str) -> bool:
    """Whether an override's pattern names the module, as a shell matches file names."""
    return fnmatch.fnmatchcase(module_name, pattern)


def resolve(level: str | Policy) -> Policy:
    """The policy of a level's name, or the policy itself; raises ValueError for an unknown name."""
    if isinstance(level, Policy):
        return level
    if not isinstance(level, str) or level not in LEVELS:
        raise ValueError(
            f"a level must be one of {', '.join(LEVELS)} or a Policy, got {level!r}{_nearest(str(level), LEVELS)}"
        )
    return LEVELS[level]


def _role(role: Role | str) -> Role:
    if isinstance(role, Role):
        return role
    known = {r.value: r for r in Role}
    if role not in known:
        raise ValueError(f"a role must be one of {', '.join(known)}, got {role!r}{_nearest(role, known)}")
    return known[role]


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name.upper(), [k.upper() for k in known], n=1)
    found = [k for k in known if close and k.upper() == close[0]]
    return f"; did you mean {found[0]!r}?" if found else ""


def _rebuild(
    name: str, rules: Mapping[Role, Rule], parameter: Role, exceptions: tuple[tuple[str, str], ...], zero_stage: int
) -> Policy:
    return Policy(name=name, rules=rules, parameter=parameter, exceptions=exceptions, zero_stage=zero_stage)
