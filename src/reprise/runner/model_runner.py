"""Turns a scheduled step into device work and its results."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reprise import timeline
from reprise.cache.memory import allocate_caches
from reprise.config import EngineConfig
from reprise.distributed import ALONE_AGREES, Agreement, Ranks, require_same
from reprise.graphs import (
    Damage,
    GraphOwners,
    GraphRunner,
    nobody,
)
from reprise.layers.causal_lm import CausalLM
from reprise.loading import Checkpoint, load_weights
from reprise.ops import OpTable
from reprise.ops.step import NEXT
from reprise.platforms import Platform
from reprise.progress import progress
from reprise.runner.drafts import GraphOptions, Withheld, load_draft
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.examples import Examples
from reprise.runner.expert_load import ExpertLoad
from reprise.runner.model_choices import (
    build_model,
    choose_cache_dtype,
    choose_dtype,
    choose_max_tokens,
    choose_model_len,
    refuse_unshared,
)
from reprise.runner.output import Landing, PendingOutput
from reprise.runner.parts import make_parts
from reprise.runner.prompt_logprobs import PromptLogprobs
from reprise.runner.start_memory import blaming_the_prediction, graph_bytes, plan_cache
from reprise.shape import StepShape
from reprise.step import Masks, Step

logger = logging.getLogger(__name__)

AT_REST_BYTES = 1 << 20
"""Larger tensors that steps read have rows of requests, which are made anew for each."""


class ModelRunner:
    """Owns the model, its cache, the step buffers and the sampler of one device.

    Args:
        config: Validated options; the platform has adjusted them.
        platform: The device.
        checkpoint: What to load.
        ranks: What this one's part of the model is, and how it agrees with the others.
        ready: Waits until the device and the compiler of kernels have started; called before the
            first kernel is compiled.

    Raises:
        ModelError: The architecture or the dtype is not supported.
        LoadError: The weights do not load.
        CapacityError: The model and a cache do not fit.
    """

    def __init__(
        self,
        config: EngineConfig,
        platform: Platform,
        checkpoint: Checkpoint,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.platform = platform
        self.ranks = ranks
        with timeline.span("platform"):
            platform.activate()
        cache_dtype = choose_cache_dtype(config.kv_cache_dtype, checkpoint.config, platform)
        self.ops = OpTable(platform, config.ops, batch_invariant=config.batch_invariant)
        self.dtype = choose_dtype(config.dtype, checkpoint.config, platform)
        if ranks.agreement.size > 1:
            chosen = {name: each.name for name, each in self.ops.chosen.items()}
            alike = config.replace(device=platform.name)
            require_same(ranks.agreement, torch.__version__, alike, self.dtype, chosen)
        refuse_unshared(config)
        wanted_len = choose_model_len(config.max_model_len, checkpoint.config)
        self.num_drafts = config.num_drafts
        self.decode_widths = config.decode_widths
        self.block_size = config.block_size or platform.default_block_size
        self.max_tokens = choose_max_tokens(config, platform, wanted_len)
        with torch.inference_mode():
            self.model, self._draft = self._load(checkpoint, wanted_len, cache_dtype)
            self.expert_load: ExpertLoad | None = None
            if config.count_expert_load:
                self.expert_load = ExpertLoad(self.model, self.ops, platform.device)
            self._draft_agreement = ALONE_AGREES
            """Of the ranks that the draft's passes wait for."""
            in_step: Agreement | None = None
            if self._draft is not None and self._draft.waits:
                self._draft_agreement = ranks.agreement
                in_step = None if ranks.agreement.alike else ranks.agreement
            parts = make_parts(
                config, platform, self.model, self._draft, self.ops,
                max_tokens=self.max_tokens, max_model_len=wanted_len, in_step=in_step,
            )  # fmt: skip
            self.caches, self.cache_layout = parts.caches, parts.layout
            self.lookahead = parts.lookahead
            self.buffers, self.forward_pass = parts.buffers, parts.forward_pass
            # Before graphs are captured: what they spoil has to be known, and made good.
            self.sampler, self.drafter = parts.sampler, parts.drafter
            self._prompt_logprobs = PromptLogprobs(self.buffers, platform)
            self._withheld = Withheld(self.buffers.rows, platform)
            self._sound: Tensor | None = None
            """Of the step's copies of states, whether they are of finite numbers."""
            self.forward_pass.beside = self._memory_beside
            self._checkpoint = checkpoint.path
            self.forward_pass.reload = self._reload
            self._prepare(wanted_len, ready)
            if self.expert_load is not None:
                self.expert_load.reset()
        self._shape = StepShape.decode(0)
        self._at_least: StepShape | None = None
        self._result: Tensor | None = None
        """Of the step that was submitted last."""
        # While a step is under way, the one before it may still be read.
        self._landings = [self._new_landing() for _ in range(2)]

    def _load(
        self, checkpoint: Checkpoint, wanted_len: int, cache_dtype: torch.dtype | None
    ) -> tuple[CausalLM, DraftModel | None]:
        """The model and what drafts for it, with their weights."""
        config, platform, ranks = self.config, self.platform, self.ranks
        with timeline.span("model"):
            model = build_model(
                checkpoint.config,
                max_model_len=wanted_len,
                table_blocks=config.max_num_seqs * -(-wanted_len // self.block_size),
                dtype=self.dtype,
                cache_dtype=cache_dtype,
                num_drafts=self.num_drafts,
                platform=platform,
                step_tokens=self.max_tokens,
                group=ranks.group,
                exchange=ranks.exchange,
            )
        with timeline.span("weights"):
            load_weights(model, checkpoint.path, config.load_format, platform, config.seed)
        with timeline.span("draft"):
            draft = load_draft(
                config, model, checkpoint, platform,
                max_model_len=wanted_len, cache_dtype=cache_dtype,
                group=ranks.group, exchange=ranks.exchange,
            )  # fmt: skip
        return model, draft

    def _prepare(self, wanted_len: int, ready: Callable[[], None]) -> None:
        """Compile kernels, measure what a step takes, plan graphs, give the caches the memory that
        is left, and capture."""
        config, platform, ranks = self.config, self.platform, self.ranks
        # Until its size is known the cache is the null blocks alone.
        allocate_caches(self.caches, self.cache_layout, platform)
        examples = Examples(
            config, self.ops, platform, self.model, self.forward_pass, self.buffers,
            self.drafter, self.max_tokens, ranks.group,
        )  # fmt: skip
        with timeline.span("config"):
            ready()
        if config.batch_invariant:
            examples.refuse_what_varies()
        with contextlib.ExitStack() as compiling:
            with timeline.span("compile"):
                kernels = compiling.enter_context(examples.compiling_kernels())
            with timeline.span("profile"):
                activation_bytes = examples.measure_activations()
                self._at_rest = self._copies_at_rest()
                """What steps read, as it is while there is no request: some of it is written
                once. No graph has run yet, which might have changed it."""
                self.graphs = self._plan_graphs()
                """The target's."""
                self.graphs.captures.leave_out_useless()
                drafts = {} if self.drafter is None else self.drafter.owners
                self.owners = GraphOwners({"target": self.graphs, **drafts})
                """Of all graphs: the target's, and those of a model that drafts."""
                memory = self.graphs.captures.memory
                activation_bytes += graph_bytes(config, self.owners, memory)
            with timeline.span("compile"):
                kernels.ready()
            with blaming_the_prediction(self.graphs.captures):
                self.cache_layout, self.max_model_len = plan_cache(
                    self.cache_layout, config, platform, ranks.agreement,
                    wanted_len=wanted_len, max_tokens=self.max_tokens,
                    reserved_bytes=activation_bytes,
                )  # fmt: skip
                self._make_cache()
                with timeline.span("capture"):
                    self._capture_graphs()
            with timeline.span("compile"):
                compiling.close()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """:meth:`submit` and :meth:`sample` are called in the ``with`` block."""
        return self.ops.computing()

    def submit(self, step: Step, at_least: StepShape | None = None) -> None:
        """Start computing a step; :meth:`sample` comes next.

        At most one earlier step may still be unfinished: what it drew, this one takes on the
        device.

        Args:
            step: What to compute. With ``at_least`` it may have no request at all, and a decode
                step is laid out as a mixed one if that is mixed.
            at_least: See :meth:`reprise.graphs.GraphRunner.run`.
        """
        self.owners.settle()
        if self.owners.capture_wanted():
            self._forget_inputs()
        self.sampler.admit(step)
        if self.drafter is not None:
            self.drafter.admit(step)
        shape = step.shape
        if at_least is not None:
            shape = shape.laid_out_as(at_least) if step.rows else at_least.empty
        self._shape, self._at_least = shape, at_least
        self.buffers.fill(step, shape, self.graphs.padded(shape, at_least))
        self._sound = None
        if step.copies:
            self._sound = self.forward_pass.copy_states(step.copies)
            self.owners.caches_changed()
        self._result = self.graphs.run(shape, at_least)

    def sample(self, step: Step, masks: Masks | None = None) -> PendingOutput:
        """Draw the tokens of the step that was submitted last and move its requests on; its results
        arrive through the returned handle.

        Args:
            step: That step.
            masks: Tokens that may be drawn from some rows of logits; None: all may be.
        """
        result, buffers = self._result, self.buffers
        assert result is not None, "submit comes first"
        landing = self._landing()
        prompt_logprobs = self._prompt_logprobs.of(step, result, self._logits, landing)
        numbers, logprobs = buffers.numbers, None
        drawn, peaks = buffers.none_drawn, None
        if buffers.num_draws:
            chosen = buffers.sampling_rows()
            if chosen is not None:
                result, numbers = result[chosen], numbers[chosen]
            drawn, peaks, logprobs = self.sampler(
                self._logits(result), step, numbers, masks, self.graphs.ran.first
            )
        rows, first_draw = buffers.rows_and_draws
        if self.drafter is not None:
            self.drafter.judge(step, rows, first_draw, drawn)
        emitted = buffers.advance(drawn)
        if buffers.num_draws:
            self.sampler.count(buffers.new_tokens)
        # Before anything is drafted, so that the tokens arrive while that runs.
        pending = PendingOutput(
            step, buffers.rows, emitted, peaks, logprobs, prompt_logprobs, landing, self._sound
        )
        if self.drafter is not None and (step.rows or self.drafter.in_step):
            self.drafter.propose(step, rows, buffers.new_tokens, self._shape, self._at_least)
            self._withheld.apply(step, rows)
            if masks is not None:
                pending.add_drafts(buffers.rows.numbers[NEXT + 1 :].index_select(1, rows))
        return pending

    def _landing(self) -> Landing:
        """A free one, or a new one where more steps are under way than the engine has."""
        for found in self._landings:
            if found.free:
                break
        else:
            found = self._new_landing()
            self._landings.append(found)
        found.free = False
        return found

    def _new_landing(self) -> Landing:
        requests, width = self.config.max_num_seqs, 1 + self.num_drafts
        return Landing(requests, width + 1, requests * width, self.platform)

    def _memory_beside(self) -> dict[str, Tensor]:
        """What lies on the device from step to step and that no forward pass may touch."""
        drafter = {} if self.drafter is None else self.drafter.memory()
        sound = {} if self._sound is None else {"soundness of copied states": self._sound}
        return {**self.sampler.memory(), **drafter, **self._withheld.memory(), **sound}

    def forget_steps(self) -> None:
        """A step failed half-way: trust nothing that steps leave behind for the next one."""
        self._landings.clear()
        self._result = None
        self._come_to_rest()

    def _copies_at_rest(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (each.tensor, each.tensor.to("cpu", copy=True))
            for each in self.forward_pass.memory().values()
            if each.owner in ("input", "beside") and each.tensor.nbytes <= AT_REST_BYTES
        ]

    def _come_to_rest(self) -> None:
        """Give what steps read, and what ops keep, the content that it has while there is no
        request: graphs may have written there, or over copies that it was put back from."""
        self._forget_inputs()
        self.sampler.forget()
        with torch.inference_mode():
            for tensor, content in self._at_rest:
                tensor.copy_(content)
            self.buffers.rows.clear()
            self.owners.settle_ops()

    def _forget_inputs(self) -> None:
        self.buffers.forget()
        if self.drafter is not None:
            self.drafter.forget()

    def forget_draws(self) -> None:
        """What was drawn so far is counted anew: requests are computed again."""
        self.sampler.forget()

    def prove_more(self, wanted: Callable[[], bool] = nobody) -> bool:
        """See :meth:`reprise.graphs.Captures.prove_more`, of all owners."""
        more = self.owners.prove_more(wanted)
        if self.owners.damaged:
            self._come_to_rest()
        return more

    def check(self) -> None:
        """Raise a RanksError if other ranks are lost."""

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call this when other ranks are lost, in a thread of its own."""

    def close(self, until: float) -> None:
        """Take leave of other ranks, if there are any, by then (as ``time.monotonic`` says)."""

    def settle_weights(self) -> None:
        """See to the weights before some are refilled on purpose: what a graph has changed and was
        not looked at would be taken for right from then on."""
        self.owners.settle(everything=True)

    def weights_replaced(self) -> None:
        """The weights were refilled on purpose: they are right now, and no checkpoint has them."""
        self.forward_pass.reload = None
        self.owners.weights_changed()

    def _reload(self, weights: Sequence[str]) -> None:
        """Load the model's parameters again, and what it computes from the config."""
        logger.warning("loading the weights again: %s were changed", ", ".join(weights))
        config = self.config
        load_weights(self.model, self._checkpoint, config.load_format, self.platform, config.seed)
        if self._draft is not None:
            self._draft.reload()
        self.forward_pass.restore_tables()

    def _logits(self, rows: Tensor) -> Tensor:
        """Logits of rows of the step's result, which for a decode step they are already."""
        return rows if self._shape.phase == "decode" else self.model.logits(rows)

    def harmless(self, owner: str, damage: Damage) -> bool:
        """A graph that was found wrong has cost accepted drafts at most, and no token."""
        drafts = bool(damage.wrong) and all(each.startswith("draft") for each in damage.wrong)
        return owner != "target" and drafts

    def _plan_graphs(self) -> GraphRunner:
        options = GraphOptions.of(self.config, self.max_tokens, self.platform, self.ranks.agreement)
        if self.drafter is not None:
            self.drafter.plan_graphs(replace(options, agreement=self._draft_agreement))
        return options.runner(self.forward_pass, self.buffers, self.decode_widths)

    def _make_cache(self) -> None:
        with timeline.span("cache"):
            allocate_caches(self.caches, self.cache_layout, self.platform)
        self.forward_pass.use_cache(self.cache_layout, self.max_model_len)
        if self.drafter is not None:
            self.drafter.use_cache(self.cache_layout, self.max_model_len)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache, in all pools, the null blocks included."""
        return sum(each.num_blocks for each in self.cache_layout.pools)

    def _capture_graphs(self) -> None:
        with progress("graphs", 0) as bar:
            self.owners.capture_all(bar.show)
        self._come_to_rest()
