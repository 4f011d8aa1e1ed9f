"""The one optimizer step: read what is stored, update in FP32, write back as the policy says.

An optimizer is a pure FP32 update and the role of each state it keeps; this file does the rest. It knows no format (the
policy does) and no process group (gradients arrive reduced).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import RESIDUAL, WHOLE
from msamp_like.kernels import Noise, Operand, Row
from msamp_like.optim import residual, saving
from msamp_like.optim.offload import Home, Offloaded
from msamp_like.optim.outcome import Outcome, Outcomes, judged
from msamp_like.optim.placement import Placement
from msamp_like.optim.release import GradientRelease, Released
from msamp_like.policy import O2, Policy, Role, Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, real

Group = Mapping[str, Any]
State = dict[str, Any]


class LowPrecisionOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: a subclass names its states' roles and gives :meth:`update`.

    Matrices that the conversion made ScalingTensors keep their states as ``policy`` says; every other parameter (norms,
    biases, skipped modules) keeps FP32 states. Where the parameter holds the compute weight alone, or plain values in
    another dtype than FP32, its master is one more state, ``master_weight``.

    ``amp.initialize`` connects an optimizer to its model's amax histories. One that is built directly on a converted
    model steps it just so, but leaves the histories empty: every scale then comes from the tensor at hand.

    A step with a non-finite gradient changes nothing, is counted in ``skipped_steps`` and logged. ``seed`` starts the
    random stream of stochastic rounding, which also depends on parameter, step and role, and on nothing else.

    Several ranks that hold different gradients set ``agree_max``, which makes a small tensor its maximum over all of
    them in place, and :meth:`place` the parameters where each rank steps only its own. ``before_update`` is called once
    a step, when every gradient is there and before anything is stepped.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    needs_whole_matrices: ClassVar[bool] = False
    """Whether an update reads more of a matrix than the element that it writes: a shard cannot be stepped alone."""

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, policy: Policy | None = None, seed: int = 0
    ) -> None:
        super().__init__(params, defaults)
        self.policy = policy or O2
        self.seed = seed
        self._outcomes = Outcomes()
        self.agree_max: Callable[[Tensor], None] | None = None
        self.before_update: Callable[[], None] | None = None
        self.placement: Placement | None = None
        self.released: Released | None = None
        self.home = Home()

    def place(self, placement: Placement) -> None:
        """Step only what ``placement`` says that this rank owns; states of other parameters are dropped."""
        self.placement = placement
        for param, _ in self._parameters():
            if not placement.owns(param):
                self.state.pop(param, None)

    def release(self, settings: GradientRelease) -> Released:
        """Step each parameter when :meth:`.Released.take` brings its gradient; :meth:`step` closes the step."""
        pairs = list(self._parameters())

        def update(index: int) -> None:
            param, group = pairs[index]
            self.step_together([(index, param)], group)

        self.released = Released(settings, [p for p, _ in pairs], self._finiteness, update)
        return self.released

    def offload(self, *, overlap_forward: bool = False) -> Offloaded:
        """Keep matrices' states and masters on the host, and step them there, from now on; see :mod:`.offload`."""
        members = [p for p, _ in self._parameters()]
        self.home = self.placement = Offloaded(members, self._finiteness, overlap_forward=overlap_forward)
        return self.home

    def _owns(self, param: Tensor) -> bool:
        return self.placement is None or self.placement.owns(param)

    # --- what a subclass says ---------------------------------------------------------------------------------------

    def roles_of(self, group: Group) -> Mapping[str, Role]:
        """The states of a group's parameters, where groups differ; ``roles`` then names those of all."""
        return self.roles

    def update(self, param: Tensor, grad: Tensor, states: list[Tensor], group: Group, step: int) -> list[Tensor]:
        """Pure FP32 update: new [param, *states] from the old; ``step`` counts from 1."""
        raise NotImplementedError

    def betas(self, group: Group) -> Mapping[str, float]:
        """State name -> what it is multiplied by each step, for the states that are decaying averages."""
        return {}

    def fused_update(self, rows: Sequence[Row], group: Group, bad: Tensor | None) -> bool:
        """The same for a table of stored tensors on one device, in place by one kernel, which writes nothing where
        ``bad`` is not zero; False where there is none."""
        return False

    # --- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss. Every parameter's gradient is read where it was reduced to."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.home.collect()
        if self.before_update is not None:
            self.before_update()
        outcome = self._outcomes.begin(self._bad(), self.released.close() if self.released is not None else None)
        for group, members in self._parts():
            stepped = [(i, p) for i, p in members if self.home.gradient(p) is not None and self._owns(p)]
            self.step_together(stepped, group, outcome)
            if self.placement is not None:
                for index, _ in members:
                    self.placement.passed(index)
        if self.placement is not None:
            self.placement.finish()
        self._outcomes.end()
        return loss

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite. Waits for the last step."""
        return self._outcomes.skipped

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((param, group) for group in self.param_groups for param in group["params"])

    def _parts(self) -> Iterator[tuple[dict[str, Any], list[tuple[int, Tensor]]]]:
        """Parameters with their positions that are stepped by one call: a group's, cut where new values leave."""
        position = 0
        for group in self.param_groups:
            members: list[tuple[int, Tensor]] = []
            for param in group["params"]:
                members.append((position, param))
                if self.placement is not None and self.placement.ends_part(position):
                    yield group, members
                    members = []
                position += 1
            yield group, members

    def _bad(self) -> Tensor:
        """Round accumulated gradients; FP32 (1,), not zero if any of them, on any rank, is not finite."""
        flags = []
        for param, _ in self._parameters():
            grad = self.home.gradient(param)
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError("a gradient must be dense, got a sparse one; use nn.Embedding(sparse=False)")
            flags.append(torch.isfinite(self._finiteness(param)).all())
        device = next((param.device for param, _ in self._parameters()), torch.device("cpu"))
        return judged(flags, self.agree_max, device)

    def _finiteness(self, param: Tensor) -> Tensor:
        """A small tensor that is finite if and only if the gradient is."""
        found = self.home.finiteness(param)
        if found is not None:
            return found
        grad = param.grad
        if not isinstance(grad, ScalingTensor):
            return kernels.amax(grad.contiguous(), WHOLE)  # type: ignore[union-attr]
        rule = self.policy[Role.GRAD_WEIGHT]
        if grad.format != rule.format and rule.format.scaled:
            plain = grad.payload if not grad.format.scaled else grad.dequantize(torch.float32)
            rounded = quantize(plain, rule)
            if not grad.format.scaled:
                rounded.scale_inv.mul_(grad.scale_inv)  # 1, what clipping made of it, or the flag
            grad.replace_(rounded)
        return grad.scale_inv if grad.format.scaled else kernels.amax(grad.payload, WHOLE) * grad.scale_inv

    def step_together(
        self, members: Sequence[tuple[int, Tensor]], group: Group, outcome: Outcome | None = None
    ) -> None:
        """Step parameters of one group, given with their positions among all, unless the outcome says to leave the step
        out; one kernel call for a device."""
        tables: dict[torch.device, list[Row]] = {}
        for index, param in members:
            tables.setdefault(self.home.device(param), []).append(self._row(param, group, index))
            if outcome is not None:
                outcome.counts(self.state[param])
        for device, rows in tables.items():
            bad = None if outcome is None else outcome.on(device)
            if not self.fused_update(rows, group, bad):
                kernels.steps_(rows, functools.partial(self._updated, group), bad)
        for rows in tables.values():
            # kernels write behind autograd's back, and a graph that has saved these must not go on with new values
            written = [part.payload for row in rows for part in (row.param, row.copy) if part is not None]
            torch.autograd.graph.increment_version(written)
        for _, param in members:
            master, param = self.state[param].get("master_weight"), self.home.twin(param)
            if isinstance(param, ScalingTensor) and self._in_two_parts(param):
                param.recorded = True
            elif master is not None and self._copy_of(param) is None:
                param.copy_(master)

    def _updated(self, group: Group, param: Tensor, grad: Tensor, *states: Tensor, step: int) -> list[Tensor]:
        """:meth:`update` as kernels call it."""
        return self.update(param, grad, list(states), group, step)

    def _row(self, param: Tensor, group: Group, index: int) -> Row:
        """The stored tensors of one parameter; counts the step."""
        state = self._initialized(param, group)
        state["step"] += 1
        param = self.home.twin(param)
        where = (index, state["step"]) if isinstance(param, ScalingTensor) else None
        betas = self.betas(group)
        master, copy, rest = state.get("master_weight", param), None, None
        if isinstance(param, ScalingTensor) and self._in_two_parts(param):
            master, rest = param, residual.lower_half(param, state)
        elif "master_weight" in state:
            copy = self._copy_of(param)
        elif isinstance(param, ScalingTensor):
            copy = param.cast_to_update()
        states = tuple(self._operand(state[n], role, betas.get(n), where) for n, role in self.roles_of(group).items())
        return Row(
            param=self._operand(master, Role.MASTER_WEIGHT, None, where),
            grad=self._operand(param.grad, Role.GRAD_WEIGHT, None, None),  # type: ignore[arg-type]
            states=states,
            step=state["step"],
            copy=copy,
            residual=rest,
        )

    def _copy_of(self, param: Tensor) -> Operand | None:
        """A parameter that is made from its master each step, as kernels write it; None where ``copy_`` must."""
        if isinstance(param, ScalingTensor):
            param.agreed = False
            param.drop_casts()  # a kernel writes the weight itself and no copy in yet another format
            return param.operand
        if param.dtype not in (torch.bfloat16, torch.float32) or not param.is_contiguous():
            return None
        return Operand(param, torch.ones(1, 1, dtype=torch.float32, device=param.device), WHOLE)

    def _operand(self, tensor: Tensor, role: Role, beta: float | None, where: tuple[int, int] | None) -> Operand:
        """A state as kernels take it; ``where`` is (parameter, step) of a matrix, whose roles may round
        stochastically."""
        noise = None
        if where is not None and self.policy[role].rounds_stochastically(beta):
            noise = Noise(self.seed, *where, role.index)
        if isinstance(tensor, ScalingTensor):
            return Operand(*tensor.operand[:3], noise)
        # a gradient may have any dtype; the others are FP32 here, so that this is the tensor itself and no copy
        return Operand(tensor.float(), torch.ones(1, 1, dtype=torch.float32, device=tensor.device), WHOLE, None)

    # --- states -----------------------------------------------------------------------------------------------------

    def _initialized(self, param: Tensor, group: Group) -> State:
        state = self.state[param]
        state.setdefault("step", 0)
        for name, role in self.roles_of(group).items():
            if name not in state:
                zeros = torch.zeros(param.shape, dtype=torch.float32, device=self.home.device(param))
                state[name] = self.stored(param, zeros, role)
        if "master_weight" in state or not self._keeps_master(param):
            return state
        twin = self.home.twin(param)
        if isinstance(twin, ScalingTensor) and self._in_two_parts(twin):
            state.update(residual.split_(twin, real(twin)))
        else:
            state["master_weight"] = self.stored(twin, real(twin), Role.MASTER_WEIGHT)
        return state

    def _keeps_master(self, param: Tensor) -> bool:
        """Whether the parameter is not its own master: a compute weight, or a plain one in another dtype than FP32."""
        if isinstance(param, ScalingTensor):
            return self.policy.parameter is not Role.MASTER_WEIGHT
        return param.dtype != torch.float32

    def _in_two_parts(self, param: Tensor) -> bool:
        """Whether the parameter is the upper half of its master, and the state ``master_weight`` the lower."""
        return isinstance(param, ScalingTensor) and self.policy.master(param.format).format == RESIDUAL

    def _in_halves(self, param: Tensor, write: Callable[[Any], State]) -> State:
        """The states that ``write`` makes of a weight, which it may change."""
        states = write(self.home.twin(param))
        self.home.send(param)
        return states

    def stored(self, param: Tensor, value: Tensor, role: Role) -> Tensor:
        """A state of ``param`` as it is kept: per the policy for a converted matrix, plain FP32 for anything else."""
        value = value.detach().float().to(self.home.device(param))
        if not isinstance(param, ScalingTensor):
            return value.clone()
        rule: Rule = self.policy.master(param.format) if role is Role.MASTER_WEIGHT else self.policy[role]
        if not (rule.format.scaled or rule.format.bytes < 4):
            return value.clone()
        return quantize(value, rule)

    def adopt(
        self, param: Tensor, states: Mapping[str, Any], original: Tensor | None = None, group: Group | None = None
    ) -> None:
        """Take over the states of an optimizer that has stepped, and the master of a weight that is now stored."""
        taken: State = {"step": saving.steps(states)}
        if original is not None and self._in_two_parts(param):  # on all ranks, which hold the weight as its owner does
            taken.update(self._in_halves(param, functools.partial(residual.split_, value=original)))
            original = None
        if not self._owns(param):
            return
        for name, role in (self.roles if group is None else self.roles_of(group)).items():
            if states.get(name) is not None:
                taken[name] = self.stored(param, states[name], role)
        if original is not None and self._keeps_master(param):
            taken["master_weight"] = self.stored(param, original, Role.MASTER_WEIGHT)
        self.state[param].update(taken)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} belongs to the model it was initialized with and is neither copied nor pickled; "
            "copy or save amp.state_dict(model, optimizer)"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's, of gradients wherever they are."""
        super().zero_grad(set_to_none)
        self.home.drop()

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict and what else a resume needs; the tensors are those of the optimizer, not copies."""
        self._outcomes.settle()
        saved = {**super().state_dict(), "seed": self.seed, "skipped_steps": self.skipped_steps}
        if self.released is not None:
            saved["gradient_norms"] = self.released.state()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state, bit for bit; also from a torch optimizer's, whose states are then stored as
        ours.

        Unlike torch's own method it never casts a state to the parameter's dtype: a second moment of 1e-9 would be 0.
        """
        self.check_state(state_dict)
        self._outcomes.restart(int(state_dict.get("skipped_steps", 0)))
        for group, old in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in old.items() if key != "params"})
        self.state.clear()
        for param, its_group, saved in saving.matched(self, state_dict):
            if self._owns(param):
                self._load_parameter(param, saved, its_group)
            elif self._in_two_parts(param):
                residual.round_as_owner_(param, saved)
        self.seed = int(state_dict.get("seed", self.seed))
        if self.released is not None:
            self.released.load_state(state_dict.get("gradient_norms", {}))

    def check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError unless :meth:`load_state_dict` can take all of ``state_dict``; nothing is written."""
        saving.check(self, state_dict, self.roles_of, self._in_two_parts)

    def _load_parameter(self, param: Tensor, saved: Mapping[str, Any], group: Group) -> None:
        state: State = {"step": saving.steps(saved)}
        for name, role in (*self.roles_of(group).items(), ("master_weight", Role.MASTER_WEIGHT)):
            value = saved.get(name)
            if value is None or (name == "master_weight" and not self._keeps_master(param)):
                continue
            if name == "master_weight" and self._in_two_parts(param):
                state.update(self._in_halves(param, lambda twin: residual.load(twin, saved)))
                continue
            fresh = self.stored(param, torch.zeros(param.shape), role)
            fresh.copy_(value)
            state[name] = fresh
        self.state[param] = state
