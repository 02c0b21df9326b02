"""The step loop: requests in, outputs out, one forward pass at a time."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from reprise import compiling, kernels_beside, platforms, timeline
from reprise.arguments import shown
from reprise.cache import CacheManager
from reprise.config import EngineConfig
from reprise.engine.blocks_ahead import BLOCKS_AHEAD
from reprise.engine.completion import CompletionGroup
from reprise.engine.detokenizer import TokenTexts
from reprise.engine.draft_choice import DraftChoice
from reprise.engine.frontend import Frontend
from reprise.engine.groups import Groups
from reprise.engine.intake import new_group
from reprise.engine.observations import Observations
from reprise.engine.pipeline import Pipeline
from reprise.engine.profiling import Profiler
from reprise.engine.recovery import Recovery
from reprise.engine.scheduler import Scheduler
from reprise.engine.start import Opened, end_of_text, open_model, refuse_several
from reprise.engine.stats import EngineStats
from reprise.engine.structured import GrammarCompiler, Grammars
from reprise.engine.submission import PreparedParams, truncated, whole_priority
from reprise.engine.weights import Weights
from reprise.errors import GraphReplayError, RanksError, RequestError, WeightsLostError, describe
from reprise.garbage import uncollected
from reprise.graphs import keep_compiled_code, nobody
from reprise.loading import NamedTensors
from reprise.metrics import Metric
from reprise.ops import put_off
from reprise.parallel import Elsewhere, Lockstep, Seat, Wish
from reprise.sampling_params import SamplingParams
from reprise.shape import StepShape
from reprise.step import Step

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 8.0
"""All that a close waits for others, together: less than a process has that is to end."""


class Engine(Frontend):
    """Computes requests until they are finished. Not thread-safe: one loop drives it.

    It connects what knows one thing each: the scheduler (which requests compute what), the pipeline
    (what the device computes at the moment), the groups (which callers get which tokens), the
    recovery (what graphs may have spoiled), the weights.

    Args:
        config: Options; the platform may adjust them, each change is logged.
        elsewhere: The ranks, if another program has started them, this process as their first.
        seat: Among engines that compute in step; None: it is alone.

    Raises:
        RepriseError: The device, model or options do not work; nothing stays allocated.
    """

    def __init__(
        self, config: EngineConfig, elsewhere: Elsewhere | None = None, seat: Seat | None = None
    ) -> None:
        refuse_several(config)
        started = time.perf_counter()
        keep_compiled_code()
        with timeline.recording() as self.startup, uncollected(), kernels_beside.used():
            with timeline.span("platform"):
                self.platform = platforms.resolve(config.device)
                if self.platform.has_triton:
                    kernels_beside.begin_for(config.arguments(), config.tensor_parallel_size)
                config, adjustments = self.platform.check_config(config)
            for each in adjustments:
                logger.info("%s", each)
            compiling.begin(self.platform.device_type, config.dtype)
            self.lockstep = None if seat is None else Lockstep(seat, self.platform)
            opened = open_model(config, self.platform, elsewhere, self.lockstep)
        try:
            self._begin(config, opened)
        except BaseException:
            opened.runner.close(time.monotonic() + CLOSE_SECONDS)
            raise
        self.startup_seconds = time.perf_counter() - started
        logger.info("ready on %s after %.2f s", self.platform.device, self.startup_seconds)

    def _begin(self, config: EngineConfig, opened: Opened) -> None:
        """Make all that goes on from the runner."""
        self.runner = runner = opened.runner
        super().__init__(
            config,
            opened.tokenizer,
            opened.checkpoint.generation_config,
            runner.model.vocab_size,
            runner.max_model_len,
            opened.devices,
        )
        self._texts = None if self.tokenizer is None else TokenTexts(self.tokenizer)
        self.eos_token_ids = end_of_text(opened)
        self.compiler = GrammarCompiler(self.tokenizer, self.vocab_size, self.eos_token_ids)
        speculation = config.speculation
        self._draft_choice: DraftChoice | None = None
        if speculation is not None and len(speculation.levels) > 1:
            self._draft_choice = DraftChoice(speculation)
        self.scheduler = Scheduler(
            CacheManager(runner.cache_layout, config.enable_prefix_caching),
            config.max_num_seqs,
            runner.max_tokens,
            self.max_model_len,
            num_drafts=runner.num_drafts,
            lookahead=runner.lookahead,
            blocks_ahead=BLOCKS_AHEAD,
            drafting=None if self._draft_choice is None else self._draft_choice.choose,
            resting=None if self._draft_choice is None else self._draft_choice.resting,
        )
        self.grammars = Grammars(
            self.vocab_size, self.eos_token_ids, pinned=self.platform.pins_memory
        )
        self.pipeline = Pipeline(runner, self.grammars, 2 if self.platform.asynchronous else 1)
        self._observations = Observations(
            config.model or "demo",
            self.max_model_len,
            runner.max_tokens,
            0 if speculation is None else speculation.num_tokens,
        )
        self._groups = Groups(self.scheduler, self.grammars, self._observations, runner.dtype)
        self._recovery = Recovery(runner, self.scheduler, self.grammars)
        alone = config.tensor_parallel_size == 1 and self.lockstep is None
        self._weights = Weights(runner, self.scheduler, alone)
        self.profiler = Profiler(self.platform)
        self._num_added = 0
        self._more_to_prove = True
        """Graphs, while no request runs."""

    # ---- requests ------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | PreparedParams | None = None,
        priority: int = 0,
        ordinal: int | None = None,
    ) -> CompletionGroup:
        """Accept a request.

        Args:
            request_id: Unique among the unfinished ones.
            prompt: Text, token ids, a dictionary as of :func:`reprise.engine.prompt.prepare`, or
                what :meth:`prepare` returned.
            params: None: :meth:`default_sampling_params`; or what :meth:`prepare_params` returned.
            priority: Lower is more urgent.
            ordinal: Number of requests before it, which decides what it draws if it has no seed;
                None: this engine's.

        Raises:
            RequestError: The prompt or the parameters are invalid.
            CapacityError: The prompt is longer than the context or the cache.
            LoadError: :meth:`update_weights` was interrupted.
            WeightsLostError: A graph has changed weights that could not be loaded again.
        """
        self.runner.check()
        if self.lockstep is not None:
            self.lockstep.check()
        self._weights.check()
        if request_id in self._groups:
            raise RequestError(f"request_id={shown(request_id)} is already running; give a new one")
        accepted = self.prepare_params(params)
        priority = whole_priority(priority)
        prepared = self.prepare(prompt)
        most = min(self.max_model_len, self.scheduler.cache.capacity + 1)
        token_ids = truncated(prepared.token_ids, accepted.params, most)
        group = new_group(
            request_id, replace(prepared, token_ids=token_ids), accepted, priority,
            engine_seed=self.config.seed,
            ordinal=self._num_added if ordinal is None else ordinal,
            eos_token_ids=self.eos_token_ids,
            texts=self._texts,
        )  # fmt: skip
        self._groups.add(group, accepted.grammar)
        self._num_added += 1
        return group

    def abort(self, request_ids: Iterable[str]) -> list[CompletionGroup]:
        """End requests early; unknown and finished ones are ignored. Returns those that ended."""
        return self._groups.abort(request_ids)

    # ---- steps ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def num_requests(self) -> int:
        """Callers' unfinished ones."""
        return len(self._groups)

    @property
    def must_step(self) -> bool:
        """The thread that drives the engine has to call :meth:`step`: for requests, or since
        engines that compute in step with this one have some."""
        return (
            self.has_work
            or bool(self.pipeline.steps)
            or (self.lockstep is not None and self.lockstep.must_meet)
        )

    def resting(self) -> contextlib.AbstractContextManager[None]:
        """In the ``with`` block no thread calls :meth:`step`: see :meth:`Lockstep.resting`."""
        return contextlib.nullcontext() if self.lockstep is None else self.lockstep.resting()

    def finish_steps(self) -> None:
        """Steps that run ahead may still hold blocks of finished requests: see to their end, if no
        request runs."""
        while self.has_work and not self._groups:
            self.step()

    def step(self) -> list[CompletionGroup]:
        """Advance by one forward pass. Returns the requests that have new tokens or ended.

        A graph whose replay raises costs time alone: running requests are computed again without
        it. If the device fails, or the caller is interrupted, every request is aborted and the
        engine is ready for new ones when the exception arrives.
        """
        try:
            try:
                return self._advance()
            except GraphReplayError as error:
                if self.lockstep is not None:
                    raise  # others have computed it
                self._recovery.replay_failed(error)
                self.pipeline.clear()
                return []
        except BaseException as error:
            self._lose_step(error)
            self.start_over()
            raise

    def prove_idle(self, wanted: Callable[[], bool] = nobody) -> bool:
        """Use a moment without requests for graphs: capture one that start-up has left out, or
        prove one further by a comparison of at most a tenth of a second, which is given up before
        it replays if ``wanted`` says that a request waits. Whether another call may find more to
        do."""
        if self.has_work or not self._weights.whole or self.profiler.running:
            return False
        try:
            if self.lockstep is None:
                self._prove(wanted)
            else:
                self._advance(Wish.PROVE)
        except BaseException as error:
            self._lose_step(error)
            self.start_over()
            raise
        return self._more_to_prove

    def _lose_step(self, error: BaseException) -> None:
        """A step failed half-way, of which others that compute it as well may have more."""
        if isinstance(error, WeightsLostError):
            self._weights.lose(error)
        if self.lockstep is not None and isinstance(error, Exception):
            self.lockstep.lose(error)

    def _prove(self, wanted: Callable[[], bool] = nobody) -> None:
        self._more_to_prove = self.runner.prove_more(wanted)
        self._recovery.heed_canaries()

    def _meet(self, lockstep: Lockstep, step: Step | None, wish: Wish) -> None:
        """Do what all engines that compute in step do now.

        Args:
            lockstep: Of these engines.
            step: To be computed here; None: nothing.
            wish: What this engine has to do if no step is computed.
        """
        if step is not None:
            wish = Wish.STEP
        elif self.has_work:
            wish = Wish.WAIT
        elif not lockstep.must_meet and wish is Wish.NOTHING:
            return
        agreed = lockstep.meet(wish, None if step is None else step.shape)
        if agreed.wish == Wish.PROVE:
            self._prove()
        elif agreed.shape is not None:
            self._submit(Step.of_nobody() if step is None else step, agreed.shape)

    def _submit(self, step: Step, *at_least: StepShape) -> None:
        """Start a step, padded to a shape where others compute one too."""
        requests = self.scheduler.requests_of(step) if step.rows else ()
        self.pipeline.submit(step, requests, *at_least)
        self._recovery.submitted(step, requests)

    def _advance(self, wish: Wish = Wish.NOTHING) -> list[CompletionGroup]:
        """Submit a step and take the results of an earlier one.

        Args:
            wish: What engines that compute in step may do if none has a request.
        """
        pipeline = self.pipeline
        step = self.scheduler.schedule()
        before = len(pipeline.steps)
        if self.lockstep is not None:
            self._meet(self.lockstep, step, wish)
        elif step is not None:
            self._submit(step)
        if not pipeline.steps or before < len(pipeline.steps) < pipeline.depth:
            return []
        done, output = pipeline.oldest()
        self._recovery.succeeded()
        if not done.requests:
            return []
        self._observations.step(done.step, output)
        if self._draft_choice is not None:
            self._draft_choice.step_done(done.step, output.sampled)
        return self._groups.take(done.step, done.requests, output, done.unseen)

    def update_weights(self, weights: NamedTensors) -> None:
        """Replace values of the model's parameters in place and forget all cached prefixes.

        Raises:
            RequestError: Requests are unfinished: they would be computed with both.
            LoadError: Weights do not fit, then nothing has changed; or one could not be copied.
                No request is accepted then until it has been replaced.
        """
        if self.has_work:
            raise RequestError(
                f"update_weights while {len(self._groups)} request(s) are running: wait for them, "
                "or abort them"
            )
        self._weights.update(weights)

    def start_over(self) -> None:
        """Abort everything, in whatever state an exception left it, and be ready for requests.

        Raises:
            RanksError: Others that compute in step with this engine are lost.
        """
        put_off.forget()
        if self.lockstep is not None:
            self.lockstep.check()
        self.scheduler.start_over()
        self.runner.forget_steps()
        self._groups.clear()
        self.pipeline.clear()
        self.platform.synchronize()

    def close(self) -> None:
        """Abort everything and free the device's memory. The engine is of no use afterwards."""
        until, lost = time.monotonic() + CLOSE_SECONDS, False
        try:
            if self.profiler.running:
                self.profiler.stop()
            if self.lockstep is not None:
                self.abort(list(self._groups))
                self.lockstep.leave(self._advance)
                self.lockstep.check()
            self.runner.check()  # a device that waits for a rank that is lost may never end
            self.platform.synchronize()
        except RanksError as error:
            logger.debug("closing: %s", error)  # all that waited have got it
            lost = True
        finally:
            self.runner.close(until)
            if self.lockstep is not None:
                self.lockstep.close()
            del self.runner, self.pipeline, self._recovery, self._weights  # these hold memory
            del self.scheduler, self._groups
            gc.collect()
            try:
                self.platform.empty_cache()
            except RuntimeError as error:
                if not lost:
                    raise
                # What was submitted for the rank that is lost cannot end well.
                logger.debug("closing: %s", describe(error))

    def stats(self) -> EngineStats:
        return EngineStats(
            scheduler=self.scheduler.stats(),
            num_requests=len(self._groups),
            startup_seconds=self.startup_seconds,
            drafts=self._observations.drafts.stats(),
        )

    def metrics(self) -> list[Metric]:
        """All metrics of this moment."""
        load, ranks = self.runner.expert_load, self.runner.ranks
        return self._observations.metrics(
            self.scheduler.stats(),
            self.lockstep,
            None if load is None else load.totals(),
            1 if ranks.exchange is None else ranks.exchange.size * ranks.group.size,
        )
