"""StripedAdamW: AdamW whose second moment is the row means and the column means of a matrix."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from striped_hf.optim import backends
from striped_hf.optim.batches import Collected, collect
from striped_hf.optim.blocks import ParameterBlocks
from striped_hf.optim.capture import is_capturing
from striped_hf.optim.checked import CheckedGroup, check_params
from striped_hf.optim.checkpoint import prepare_state_dict
from striped_hf.optim.checks import check_blocks, check_group
from striped_hf.optim.interface import LOW_BITS, Backend, BlocksOption, Group, Settings, State
from striped_hf.optim.known import KnownGroups, Recognized
from striped_hf.optim.options import OPTIONS, check_options, settings_of
from striped_hf.optim.sharded import state as sharded_state
from striped_hf.optim.sharded import step as sharded_step
from striped_hf.optim.sharded.agreement import Agreement, Item
from striped_hf.optim.sharded.layout import exchanged_placements, is_sharded
from striped_hf.optim.sharded.matrix import FoldedGradients, ShardedParameter
from striped_hf.optim.state import Description, description_of, known_name, name_of, zero_state
from striped_hf.optim.steps import add_one, count_step, counter_device, next_step, next_steps
from striped_hf.optim.views import step_batch


class StripedAdamW(Optimizer):
    """AdamW at a fraction of its memory: a factored second moment and a momentum in fewer bits.

    The second moment of a matrix [..., R, C] is stored as the means of its rows and of its columns:
    R + C numbers instead of R x C. The kernel of a convolution [out, in, k...] is the matrix
    [out, in k...]. The momentum is AdamW's, optionally in fewer bits. Learning rate, schedule and
    weight decay carry over from AdamW. ``backends/reference.py`` has the equations and their
    sources, and ``matrix.py`` says how parameters of three or more dimensions are read.

    Apart from the weight decay, no element of a matrix moves further than AdamW might move it: 7.3
    learning rates at betas 0.9 and 0.999 (docs/algorithm.md).

    The state of a parameter is created at its first gradient: ``step``; ``exp_avg``, and
    ``exp_avg_scale`` for the integer formats; ``exp_avg_sq_row`` [..., R, bc] and
    ``exp_avg_sq_col`` [..., br, C] for matrices; ``exp_avg_sq`` for 0-D and 1-D parameters and for
    parameters whose stripes would be no smaller. The latter two keep AdamW's exact second moment
    and a float32 momentum. In bfloat16 they also keep ``param_low_bits``, the 16 bits of float32
    that bfloat16 lacks, so that their updates have the precision of float32. With ``master_bits``
    matrices keep the first 8 of these bits. The state of a kernel has the shapes of its matrix.

    A ``torch.optim.AdamW`` state dict can be loaded: its second moments are reduced to the means.

    Args:
        params: Parameters or param groups, named or not, of float32, bfloat16 or float16.
            Gradients may have any of the three dtypes; the arithmetic is float32.
        lr: Learning rate, a float or a tensor with one element.
        betas: Decay rates of the momentum and of the second moment, each in [0, 1).
        eps: Added to the root of the second moment, as in AdamW.
        weight_decay: Decoupled weight decay, as a rate times ``lr``.
        maximize: Maximize the objective instead of minimizing it.
        momentum_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``: how the momentum of
            matrices is stored (4, 2, 1.03 and 0.53 bytes per element).
        blocks: (br, bc): divide each matrix of the group into br x bc equal blocks, each with its
            own row and column means. They suit a matrix that packs several projections along its
            rows or columns: GPT-2's ``c_attn`` has (1, 3). 0-D and 1-D parameters ignore it.
            "kernel" or "stack" decides how parameters of three or more dimensions are read, instead
            of their shapes. A param group may also have a list with one such value for each of its
            parameters, which then follows them. A mark (``blocks.mark_blocks``) has precedence over
            the list and over (1, 1).
        backend: The backend that computes the step: ``"auto"``, the fastest that can run, or a
            name.
        stochastic_rounding: Round updates of bfloat16 and float16 parameters stochastically instead
            of to nearest. None means True. Float32 parameters ignore it.
        master_bits: 24: train bfloat16 matrices in 24 bits. Their state then has the next 8 bits of
            each element, and only the bits after these are rounded. It is for learning rates of
            1e-5 and less. Float32 parameters ignore it, and float16 parameters are refused. None:
            16 bits.
        nesterov: Use b1 m + (1 - b1) g instead of m in the update.
        lagged: Divide by the means of the step before, so that each gradient is read only once.
        capturable: Keep ``step`` on the parameters' device, and read ``lr`` from there if it is a
            tensor, so that a step can be captured in a CUDA graph. Needs the triton backend, and
            one step before the capture.

    Raises:
        ValueError: A hyperparameter is out of its range, ``blocks`` does not divide a matrix, a
            parameter has another dtype or was flattened by FSDP1, or ``master_bits`` is set for a
            float16 parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        momentum_dtype: str = "float32",
        blocks: BlocksOption = (1, 1),
        backend: str = "auto",
        stochastic_rounding: bool | None = None,
        master_bits: int | None = None,
        nesterov: bool = False,
        lagged: bool = False,
        capturable: bool = False,
    ) -> None:
        arguments = locals()
        backends.check(backend)
        self.backend = backend
        self.capturable = capturable
        self._blocks = ParameterBlocks()
        self._agreement = Agreement()
        self._backends: dict[tuple[str, str], Backend] = {}
        self._known = KnownGroups()
        defaults = {name: arguments[name] for name in OPTIONS}
        check_options(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        self._refresh_groups()
        added = ("backend", "capturable")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in added}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_blocks", ParameterBlocks())
        self.__dict__.setdefault("_agreement", Agreement())
        self.__dict__.setdefault("_backends", {})
        self.__dict__.setdefault("_known", KnownGroups())

    def add_param_group(self, param_group: Group) -> None:
        """Adds a param group.

        Raises:
            ValueError: As on construction. The optimizer has not changed then.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], len(self.param_groups) - 1)
            self._blocks.refresh(self.param_groups, self.state)
            check_blocks(self.param_groups[-1], len(self.param_groups) - 1)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def _refresh_groups(self) -> None:
        """Completes groups that other code added, and lets their blocks follow the parameters."""
        for group in self.param_groups:
            for name in OPTIONS.keys() - group.keys():
                group[name] = self.defaults[name]
        self._blocks.refresh(self.param_groups, self.state)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            RuntimeError: A parameter or its gradient has another dtype than float32, bfloat16 or
                float16, or the gradient is sparse; a state no longer fits its parameter and group;
                a wrapper flattened the parameters; only one of a parameter and its gradient is
                sharded; processes differ in the sharded matrices that they step, or only some have
                a gradient of one; the backend asked for by name cannot run; or a CUDA graph is
                captured without ``capturable``, or with it and sharded parameters. No parameter or
                state has changed then. For sharded parameters all processes raise the error.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch.compiler.disable  # a compiled training step calls it between two of its graphs
    def _update(self) -> None:
        recognized = [
            self._known.recognize(i, group, self.state, self.capturable)
            for i, group in enumerate(self.param_groups)
        ]
        groups = self._check(recognized)
        together = [sharded for group in groups for sharded in group.together]
        new: list[Tensor] = []  # parameters that get a state

        def state_of(each: ShardedParameter) -> tuple[State, int]:
            is_placed = not each.item.has_moved
            state = self._state_of(each.param, each.description, is_placed, new)
            return state, next_step(state, self.capturable)

        try:
            collected = [self._collect(i, each, new) for i, each in enumerate(groups) if each.alone]
            exchanged = sharded_step.exchange(together, self._agreement, self.state, state_of)
        except BaseException:
            self._forget(new)
            raise
        batches = [batch for each in collected for batch in each.batches] + exchanged.batches
        states = [state for each in collected for state in each.states] + exchanged.states
        copies = [pair for each in collected for pair in each.copies] + exchanged.copies
        # from here on tensors change
        unused = set(map(id, exchanged.unused))
        self._forget([param for param in new if id(param) in unused])
        count_step(states, self.capturable)
        for batch in batches:
            step_batch(batch)
        for group, found in zip(groups, recognized, strict=True):
            if found is not None:
                self._step_recognized(found, group.settings)
        sharded_step.update(exchanged)
        for target, copy in copies:
            target.copy_(copy)
        # kernels write without torch, which must learn that values saved for backward have changed
        whole = [entry.param for batch in batches for entry in batch.entries]
        parts = [matrix.local for matrix in exchanged.matrices]
        params = [param for found in recognized if found is not None for param in found.params]
        torch.autograd.graph.increment_version(whole + parts + params)

    def _check(self, recognized: list[Recognized | None]) -> list[CheckedGroup]:
        """Checks everything that the step will read or write, and changes none of it.

        Args:
            recognized: For each param group its tensors, if they were recognized.

        Returns:
            For each param group its settings, and the parameters to step if it was not recognized.
        """
        self._check_capture(recognized)
        if not all(recognized):
            self._refresh_groups()
        groups: list[CheckedGroup] = []
        first_problem: str | None = None
        for group_index, (group, found) in enumerate(
            zip(self.param_groups, recognized, strict=True)
        ):
            settings = settings_of(group, self.capturable)
            if found is not None:
                groups.append(CheckedGroup(settings, [], []))
                self._backend(found.known.device.type)
                continue
            checked, problem = check_params(
                group,
                group_index,
                settings=settings,
                states=self.state,
                blocks=self._blocks,
                capturable=self.capturable,
                sharded_of=self._sharded,
            )
            groups.append(checked)
            first_problem = first_problem or problem
            for device_type in {param.device.type for param, *_ in checked.alone}:
                self._backend(device_type)
        if first_problem is not None:
            together = [sharded for group in groups for sharded in group.together]
            self._agreement.fail(first_problem, sharded_step.plan_of(together))
        return groups

    def _collect(self, group_index: int, checked: CheckedGroup, new: list[Tensor]) -> Collected:
        collected = collect(checked, new, self._state_of, self._backend, self.capturable)
        if not checked.together:
            self._known.remember(
                group_index,
                self.param_groups[group_index],
                checked.alone,
                states=collected.states,
                batches=collected.batches,
                capturable=self.capturable,
            )
        return collected

    def _step_recognized(self, recognized: Recognized, settings: Settings) -> None:
        counters = recognized.counters
        steps = next_steps(counters, self.capturable)
        add_one(counters, self.capturable)
        recognized.step(self._backend(recognized.known.device.type), settings, steps)

    def _forget(self, params: list[Tensor]) -> None:
        for param in params:
            self.state.pop(param, None)

    def _sharded(
        self, settings: Settings, group: Group, position: int, is_valid: bool
    ) -> ShardedParameter | None:
        """Returns the argument of ``sharded_step`` for a parameter; None if it is not sharded."""
        param = group["params"][position]
        if not is_sharded(param):
            return None
        description, state, grad = (
            description_of(group, position),
            self.state.get(param),
            param.grad,
        )
        item = Item(
            name=known_name(group, position),
            description=description,
            placements=tuple(param.placements),
            grad_placements=exchanged_placements(param),
            has_moved=is_valid and sharded_state.has_moved(param, state or {}, description),
        )
        backend, folded = self._backend(param.device.type), self._folded_of(param)
        return ShardedParameter(param, grad, description, item, backend, settings, folded)

    def _folded_of(self, param: Tensor) -> FoldedGradients | None:
        """Returns the sums of a sharded matrix's folded gradients, in LayerwiseStripedAdamW."""
        return None

    def _state_of(
        self, param: Tensor, description: Description, is_placed: bool, new: list[Tensor]
    ) -> State:
        """Returns the state of a parameter, created if there is none."""
        state = self.state[param]
        if not state:
            new.append(param)
        if not state or (description.low_bits and LOW_BITS not in state):
            if is_sharded(param):
                zeros = sharded_state.init_state(param, description)
            else:
                zeros = zero_state(description, param.device)
            # in the order of zeros: processes gather the entries of a state one after another
            state.update({key: value for key, value in zeros.items() if key not in state})
        if not is_placed:
            sharded_state.follow(param, state, description)
        if len(description.stepped) == 1 < len(description.shape) and not is_sharded(param):
            for key in description.keys:  # backends get views [n], which not every layout has
                state[key] = state[key].contiguous()
        device = counter_device(param, self.capturable)
        if state["step"].device.type != device.type:
            state["step"] = state["step"].to(device)
        return state

    def _backend(self, device_type: str) -> Backend:
        backend = self._backends.get((self.backend, device_type))
        if backend is None:
            backend = backends.new(self.backend, device_type)
            self._backends[self.backend, device_type] = backend
        if self.capturable and not backend.CAPTURABLE:
            raise RuntimeError(
                f"capturable=True needs the triton backend, which does not step parameters on "
                f"{device_type} here: leave capturable out, or move the model to a GPU with triton"
            )
        return backend

    def _check_capture(self, recognized: list[Recognized | None]) -> None:
        if self.capturable or not torch.cuda.is_initialized():
            return
        devices = {torch.device("cuda", torch.cuda.current_device())}
        for group, found in zip(self.param_groups, recognized, strict=True):
            if found is None:
                devices |= {param.device for param in group["params"]}
            else:
                devices.add(found.known.device)
        if any(map(is_capturing, devices)):
            raise RuntimeError(
                "this step is being captured in a CUDA graph, which would repeat its step number "
                "and its learning rate in every replay: construct StripedAdamW with capturable=True"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch does; each group's ``blocks`` are those of its parameters."""
        self._refresh_groups()
        state_dict = super().state_dict()
        for group in state_dict.get("param_groups", ()):  # a hook may return anything
            if len(group.get("param_names", group["params"])) != len(group["params"]):
                del group["param_names"]  # other code removed parameters, and left their names
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a StripedAdamW, or of a ``torch.optim.AdamW``.

        As in torch, the saved hyperparameters replace the constructed ones, except ``master_bits``:
        a state without the bits gets zeros. Every state tensor keeps the dtype that it was saved
        with, and none shares memory with ``state_dict``.

        Raises:
            ValueError: The state dict's groups, momentum format or stripes differ from this
                optimizer's, a tensor is missing or has a wrong shape, or the state has bits of
                ``master_bits`` that this optimizer does not keep; the optimizer has not changed
                then.
        """
        prepared: dict[str, Any] = {}
        self._refresh_groups()

        # Optimizer.load_state_dict casts state to the parameter's dtype, which destroys codes and
        # rounds stripes, so it gets the groups only. These hooks run between the user's hooks:
        # pre-hooks may still replace the state dict, post-hooks see the final state. All code that
        # may fail is in the first of them: nothing has changed yet then.
        def prepare(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            prepared.update(prepare_state_dict(incoming, self.param_groups))
            places = [
                (group, i) for group in self.param_groups for i in range(len(group["params"]))
            ]
            prepared["state"] = {
                position: self._placed(loaded, *places[position])
                for position, loaded in prepared["state"].items()
            }
            return {**prepared, "state": {}}

        def restore(_: Optimizer) -> None:
            params = [param for group in self.param_groups for param in group["params"]]
            for position, loaded in prepared["state"].items():
                self.state[params[position]].update(loaded)

        pre_hook = self.register_load_state_dict_pre_hook(prepare)
        post_hook = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            pre_hook.remove()
            post_hook.remove()

    def _placed(self, loaded: State, group: Group, position: int) -> State:
        """Copies a checked state to the places where the parameter has its state."""
        param, description = group["params"][position], description_of(group, position)
        state = {}
        for key, value in loaded.items():
            if value.is_meta and not param.is_meta:
                raise ValueError(
                    f"{name_of(group, position)}: {key!r} in the state dict is on the meta device, "
                    "without values: load the file without map_location='meta'"
                )
            device = param.device
            if key == "step":
                device = counter_device(param, self.capturable)
            elif is_sharded(param):
                value = sharded_state.place_state(key, value, param, description)
            elif is_sharded(value):
                value = value.full_tensor()
            state[key] = value.to(device, copy=True, memory_format=torch.contiguous_format)
        return state
