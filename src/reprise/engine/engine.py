"""The step loop: requests in, outputs out, one forward pass at a time."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from reprise import platforms, timeline
from reprise.arguments import is_whole, plain
from reprise.cache import CacheManager
from reprise.config import EngineConfig
from reprise.distributed import ALONE, Ranks
from reprise.engine.completion import Completion, CompletionGroup
from reprise.engine.detokenizer import TokenTexts
from reprise.engine.draft_choice import DraftChoice
from reprise.engine.draft_counts import DraftStats
from reprise.engine.frontend import Frontend, load_tokenizer
from reprise.engine.observations import Observations
from reprise.engine.profiling import Profiler
from reprise.engine.prompt import PreparedPrompt
from reprise.engine.scheduler import BLOCKS_AHEAD, Scheduler, SchedulerStats
from reprise.engine.structured import GrammarCompiler, Grammars
from reprise.engine.submission import PreparedParams, check_choice, truncated
from reprise.engine.suspects import Suspects
from reprise.errors import (
    ConfigError,
    FailedRequestError,
    GrammarError,
    GraphReplayError,
    LoadError,
    NonFiniteError,
    RanksError,
    RequestError,
)
from reprise.graphs import Damage, GraphOwners, keep_compiled_code
from reprise.loading import (
    Checkpoint,
    NamedTensors,
    checkpoint_of,
    end_of_text_id,
    plan_update,
    require_method,
    update_weights,
)
from reprise.metrics import Metric
from reprise.ops.ahead import wake_compiler
from reprise.outputs import Logprobs
from reprise.parallel import Elsewhere, Leader, LeadingRunner, Lockstep, Seat, Wish
from reprise.request import Request
from reprise.runner import ModelRunner, PendingOutput, StepOutput
from reprise.sampling_params import SamplingParams
from reprise.shape import StepShape
from reprise.step import Masks, Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """Everything there is to know about the engine's state at one moment."""

    scheduler: SchedulerStats
    num_requests: int
    """Callers' requests that are not finished."""
    startup_seconds: float
    drafts: DraftStats
    """Of drafted tokens, how many counted."""
    replicas: tuple[EngineStats, ...] = ()
    """Of each engine, where there are several; all else is their sum, and the longest start-up."""


@dataclass(slots=True)
class _UnderWay:
    """A step that was submitted, and what it has brought once somebody has waited for it."""

    step: Step
    pending: PendingOutput
    output: StepOutput | None = None


class Engine(Frontend):
    """Computes requests until they are finished. Not thread-safe: one loop drives it.

    Args:
        config: Options; the platform may adjust them, each change is logged.
        elsewhere: The ranks, if somebody else has started them, this process as their first.
        seat: Among engines that compute in step; None: it is alone.

    Raises:
        RepriseError: The device, model or options do not work; nothing stays allocated.
    """

    def __init__(
        self, config: EngineConfig, elsewhere: Elsewhere | None = None, seat: Seat | None = None
    ) -> None:
        if config.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size={config.data_parallel_size}: an Engine is one; LLM, AsyncLLM "
                "and 'reprise serve' have several"
            )
        if config.computes_elsewhere:
            raise ConfigError(
                f"distributed_executor_backend={config.distributed_executor_backend!r}: an Engine "
                "is in this process; LLM, AsyncLLM and 'reprise serve' have one elsewhere"
            )
        started = time.perf_counter()
        keep_compiled_code()
        with timeline.recording() as self.startup:
            with timeline.span("platform"):
                self.platform = platforms.resolve(config.device)
                config, adjustments = self.platform.check_config(config)
            for each in adjustments:
                logger.info("%s", each)
            self.lockstep = None if seat is None else Lockstep(seat, self.platform)
            leader = None
            if config.tensor_parallel_size > 1:
                with timeline.span("ranks"):
                    leader = Leader(config, self.platform, elsewhere)
            with contextlib.nullcontext() if leader is None else leader.starting():
                checkpoint, tokenizer = self._open(config, leader)
        devices = (str(self.platform.device),) if leader is None else leader.devices
        try:
            self._begin(config, checkpoint, tokenizer, devices)
        except BaseException:
            self.runner.close()
            raise
        self.startup_seconds = time.perf_counter() - started
        logger.info("ready on %s after %.2f s", self.platform.device, self.startup_seconds)

    def _open(self, config: EngineConfig, leader: Leader | None) -> tuple[Checkpoint, Any]:
        """Read the checkpoint, make the tokenizer and the runner."""
        waking = partial(wake_compiler, self.platform)
        with timeline.span("config"), self.platform.warming_up(then=waking):
            checkpoint = checkpoint_of(config)
            require_method(config.quantization, checkpoint.config)
            tokenizer = load_tokenizer(config, checkpoint)
        if leader is None:
            ranks = Ranks(exchange=ALONE if config.enable_expert_parallel else None)
            if self.lockstep is not None:
                ranks = self.lockstep.connect()
            self.runner = ModelRunner(config, self.platform, checkpoint, ranks)
        else:
            ranks = leader.start(config, checkpoint)
            self.runner = LeadingRunner(config, self.platform, checkpoint, leader, ranks)
        return checkpoint, tokenizer

    def _begin(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        tokenizer: Any,
        devices: tuple[str, ...],
    ) -> None:
        """All that goes on from the runner."""
        super().__init__(
            config,
            tokenizer,
            checkpoint.generation_config,
            self.runner.model.vocab_size,
            self.runner.max_model_len,
            devices,
        )
        self._texts = None if self.tokenizer is None else TokenTexts(self.tokenizer)
        self.eos_token_ids = self._end_of_text(checkpoint.stop_token_ids)
        width = 1 + self.runner.num_drafts
        if self.runner.max_tokens < config.max_num_seqs * width:
            times = f" times {width} tokens, the drafted ones included" if width > 1 else ""
            raise ConfigError(
                f"max_num_batched_tokens={self.runner.max_tokens} must be at least "
                f"max_num_seqs={config.max_num_seqs}{times}, so that all requests can decode in "
                "one step"
            )
        self._draft_choice: DraftChoice | None = None
        if config.speculation is not None and len(config.speculation.levels) > 1:
            self._draft_choice = DraftChoice(config.speculation)
        self._last_decode: tuple[int | None, int, float] | None = None
        """Of the last step, if its requests did nothing but decode, how many tokens it drafted and
        how many requests it had, and when it was done."""
        self.scheduler = Scheduler(
            CacheManager(self.runner.cache_layout, config.enable_prefix_caching),
            config.max_num_seqs,
            self.runner.max_tokens,
            self.max_model_len,
            num_drafts=self.runner.num_drafts,
            lookahead=self.runner.lookahead,
            blocks_ahead=BLOCKS_AHEAD,
            drafting=None if self._draft_choice is None else self._draft_choice.choose,
        )
        self._depth = 2 if self.platform.asynchronous else 1
        """Steps under way at once: with two, the next is prepared while the device computes."""
        self._outstanding: deque[_UnderWay] = deque()
        self._groups: dict[str, CompletionGroup] = {}
        self._completions: dict[Request, tuple[CompletionGroup, Completion]] = {}
        """Where a request's results go, until its group has finished or is aborted."""
        self.compiler = GrammarCompiler(self.tokenizer, self.vocab_size, self.eos_token_ids)
        self._grammars = Grammars(self.vocab_size, self.eos_token_ids)
        self.profiler = Profiler(self.platform)
        self._observations = Observations(
            config.model or "demo",
            self.max_model_len,
            self.runner.max_tokens,
            0 if config.speculation is None else config.speculation.num_tokens,
        )
        self._num_added = 0
        self._more_to_prove = True
        """Graphs, while no request runs."""
        self._half_updated: set[str] = set()
        """Weights that may be neither old nor new, since replacing them was interrupted."""
        self._suspects = {owner: Suspects() for owner, _ in self.runner.owners}
        """Of whom the graphs are."""
        self._failed_replays = 0
        """Since the last step that succeeded."""
        self.wait_seconds = 0.0
        """Time that steps have spent waiting for the device; the rest is the host's."""

    def _end_of_text(self, listed: frozenset[int]) -> frozenset[int]:
        """The tokens that end a text: those that the configs list, and the tokenizer's own."""
        own = None if self.tokenizer is None else end_of_text_id(self.tokenizer)
        stops = listed if own is None else listed | {own}
        if stops != listed:
            logger.info(
                "token %d (%s) ends a text too: the tokenizer says so, the configs list %s",
                own, self.tokenizer.eos_token, sorted(listed) or "none",
            )  # fmt: skip
        known = frozenset(each for each in stops if 0 <= each < self.vocab_size)
        if stops != known:
            logger.warning(
                "end-of-sequence tokens %s are dropped: the vocabulary has ids 0 to %d",
                sorted(stops - known),
                self.vocab_size - 1,
            )
        return known

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
        """
        self.runner.check()
        if self.lockstep is not None:
            self.lockstep.check()
        if self._half_updated:
            raise LoadError(
                f"update_weights was interrupted: {', '.join(sorted(self._half_updated))} may be "
                "half replaced; call it again with them"
            )
        if request_id in self._groups:
            raise RequestError(f"request_id={request_id!r} is already running; give a new one")
        accepted = self.prepare_params(params)
        params = accepted.params
        priority = plain(priority)
        if not is_whole(priority):
            raise RequestError(f"priority={priority!r}: give a whole number; lower is more urgent")
        prepared = self.prepare(prompt)
        most = min(self.max_model_len, self.scheduler.cache.capacity + 1)
        prepared = replace(prepared, token_ids=truncated(prepared.token_ids, params, most))
        completions: list[Completion] = []
        ordinal = self._num_added if ordinal is None else ordinal
        for index in range(params.n):
            seed = self._seed(params, index, ordinal)
            request = self._new_request(request_id, index, prepared, accepted, priority, seed)
            completions.append(Completion(index, request, self._texts))
        check_choice(accepted, completions[0].request.stop_token_ids)
        for index, each in enumerate(completions):
            try:
                self.scheduler.add(each.request)
            except Exception:
                for added in completions[:index]:
                    self.scheduler.abort(added.request.request_id)
                raise
        self._num_added += 1
        group = CompletionGroup(request_id, prepared.text, params, completions)
        self._groups[request_id] = group
        for each in completions:
            self._completions[each.request] = (group, each)
            if accepted.grammar is not None:
                self._grammars.add(each.request, accepted.grammar)
        return group

    def abort(self, request_ids: Iterable[str]) -> list[CompletionGroup]:
        """End requests early; unknown and finished ones are ignored. Returns those that ended."""
        ended = [self._groups[name] for name in dict.fromkeys(request_ids) if name in self._groups]
        for group in ended:
            for each in group.completions:
                # The name of one that has finished may be another request's by now.
                if not each.request.is_finished:
                    self.scheduler.abort(each.request.request_id)
                    each.finish()
            self._forget(group)
        return ended

    # ---- steps ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def must_step(self) -> bool:
        """Who drives the engine has to call :meth:`step`: for requests, or since engines that
        compute in step with this one have some."""
        return (
            self.has_work
            or bool(self._outstanding)
            or (self.lockstep is not None and self.lockstep.must_meet)
        )

    def resting(self) -> contextlib.AbstractContextManager[None]:
        """In the ``with`` block nobody steps: see :meth:`Lockstep.resting`."""
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
                self._compute_again(error)
                return []
        except BaseException as error:
            self._lose_step(error)
            self.start_over()
            raise

    def prove_idle(self) -> bool:
        """Use a moment without requests to prove graphs further: one comparison, of at most a tenth
        of a second. Whether another call may find more to do."""
        if self.has_work or self._half_updated or self.profiler.running:
            return False
        try:
            if self.lockstep is None:
                self._prove()
            else:
                self._advance(Wish.PROVE)
        except BaseException as error:
            self._lose_step(error)
            self.start_over()
            raise
        return self._more_to_prove

    def _lose_step(self, error: BaseException) -> None:
        """A step failed half-way, of which others that compute it as well may have more."""
        if self.lockstep is not None and isinstance(error, Exception):
            self.lockstep.lose(error)

    def _prove(self) -> None:
        owners = self.runner.owners
        self._more_to_prove = self.runner.prove_more()
        self._heed_canaries(owners)

    def _meet(self, lockstep: Lockstep, step: Step | None, wish: Wish) -> None:
        """Do what all engines that compute in step do now.

        Args:
            lockstep: Of them.
            step: To be computed here; None: nothing.
            wish: What there is to do otherwise.
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
        """Start a step.

        Args:
            step: It.
            at_least: As of :meth:`reprise.runner.ModelRunner.submit`, where others compute too.
        """
        with self.runner.active():
            self.runner.submit(step, *at_least)
            requests = self.scheduler.requests_of(step) if step.rows else ()
            # Grammars follow the tokens before the step's while the device computes it.
            masks = self._masks(step, requests)
            self._outstanding.append(_UnderWay(step, self.runner.sample(step, masks)))
        owners = self.runner.owners
        for owner, graphs in owners:
            self._suspects[owner].note(step, requests, graphs.ran)
        self._heed_canaries(owners)

    def _advance(self, wish: Wish = Wish.NOTHING) -> list[CompletionGroup]:
        """Submit a step and take the results of an earlier one.

        Args:
            wish: What engines that compute in step may do if none has a request.
        """
        step = self.scheduler.schedule()
        before = len(self._outstanding)
        if self.lockstep is not None:
            self._meet(self.lockstep, step, wish)
        elif step is not None:
            self._submit(step)
        if not self._outstanding or before < len(self._outstanding) < self._depth:
            return []
        output = self._output_of(self._outstanding[0])
        oldest = self._outstanding.popleft()
        self._failed_replays = 0
        return self._take(oldest.step, output) if oldest.step.rows else []

    def _masks(self, step: Step, requests: Sequence[Request]) -> Masks | None:
        """Which tokens may be drawn in the step that was submitted last. Only if one of its
        requests has a grammar does this wait for the tokens of the step before it."""
        if not self._grammars.count or not self._grammars.concern(step, requests):
            return None
        for each in self._outstanding:
            self._output_of(each)
        return self._grammars.masks(step, requests)

    def _output_of(self, each: _UnderWay) -> StepOutput:
        """Its results, waited for."""
        if each.output is None:
            began = time.perf_counter()
            each.output = each.pending.wait()
            self.wait_seconds += time.perf_counter() - began
            if self._grammars.count and each.step.rows:
                self._grammars.take(self.scheduler.requests_of(each.step), each.output)
        return each.output

    def _compute_again(self, error: GraphReplayError) -> None:
        """Drop the steps under way, whose results are lost, and all that they may have spoiled."""
        self._failed_replays += 1
        if self._failed_replays > self.runner.owners.num_graphs:
            raise error  # each refuses one graph, so something else is wrong
        self._outstanding.clear()
        count = self.scheduler.drop_steps()
        self.runner.forget_steps()
        self.platform.synchronize()
        logger.warning("%s; %d running request(s) are computed again without it", error, count)

    def _heed_canaries(self, owners: GraphOwners) -> None:
        """Compute again what a graph has spoiled that was found wrong."""
        for owner, damage in owners.take_damages():
            self._heed(owner, damage)

    def _heed(self, owner: str, damage: Damage) -> None:
        """Its replays since it was last found right may have been wrong too. Tokens that callers
        have got cannot be taken back, keys and values can."""
        if self.runner.harmless(owner, damage):
            logger.warning(
                "graph %s drafted wrong tokens, or wrong keys and values of drafts: fewer drafts "
                "counted than should have, and no token is wrong", damage.name,
            )  # fmt: skip
            return
        suspect = self._suspects[owner].accuse(damage.graph)
        if suspect:
            logger.warning(
                "%d token(s) that callers may have were drawn from graph %s since it was last "
                "found right: see suspect_from of their outputs",
                suspect,
                damage.name,
            )
        if damage.earlier:
            self.runner.forget_draws()
            count = self.scheduler.recompute()
            logger.warning(
                "graph %s was wrong: cached prefixes are forgotten and %d running request(s) "
                "computed again, for it may have written what they read",
                damage.name,
                count,
            )
        elif damage.units:
            owners = self.scheduler.recompute_owners(damage.units)
            logger.warning(
                "graph %s has written %s, which its step did not own: what the cache had "
                "of them is forgotten, and computed again for %s",
                damage.name,
                ", ".join(f"{unit} {index}" for unit, index in sorted(damage.units)),
                ", ".join(owners) or "no running request",
            )

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
        self.platform.activate()
        if self.config.tensor_parallel_size > 1 or self.lockstep is not None:
            raise RequestError(
                "update_weights where several ranks compute one model (tensor_parallel_size, "
                "enable_expert_parallel) is not supported: create a new engine"
            )
        copies = plan_update(self.runner.model, weights)
        self.scheduler.reset_prefix_cache()
        self._half_updated |= copies.keys()
        update_weights(copies, self.platform)
        self._half_updated -= copies.keys()
        self.runner.weights_replaced()

    def start_over(self) -> None:
        """Abort everything, in whatever state an exception left it, and be ready for requests.

        Raises:
            RanksError: Others that compute in step with this engine are lost.
        """
        if self.lockstep is not None:
            self.lockstep.check()
        self.scheduler.start_over()
        self.runner.forget_steps()
        self._outstanding.clear()
        self._grammars.clear()
        self._groups.clear()
        self._completions.clear()
        self.platform.synchronize()

    def close(self) -> None:
        """Abort everything and free the device's memory. The engine is of no use afterwards."""
        try:
            if self.profiler.running:
                self.profiler.stop()
            if self.lockstep is not None:
                self.abort(list(self._groups))
                self.lockstep.leave(self._advance)
            self.start_over()
        except RanksError as error:
            logger.debug("closing: %s", error)  # whoever waited has got it
        finally:
            self.runner.close()
            if self.lockstep is not None:
                self.lockstep.close()
            del self.runner, self.scheduler
            gc.collect()
            self.platform.empty_cache()

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

    def _observe_drafts(self, choice: DraftChoice, step: Step, output: StepOutput) -> None:
        now, requests = time.perf_counter(), len(step.rows)
        known, self._last_decode = self._last_decode, None
        if step.drafting is None or step.num_decodes < requests or not requests:
            return
        self._last_decode = step.drafting, requests, now
        if known is not None and known[:2] == (step.drafting, requests):
            tokens = sum(map(len, output.sampled)) / requests
            choice.observe(requests, step.drafting, now - known[2], tokens)

    def _take(self, step: Step, output: StepOutput) -> list[CompletionGroup]:
        """Give a step's results to the requests."""
        completions = self._completions
        self._observations.step(step.num_tokens)
        if output.drafted:
            self._observations.drafts.add(step.num_decodes, output.drafted, output.sampled)
        if self._draft_choice is not None:
            self._observe_drafts(self._draft_choice, step, output)
        requests = self.scheduler.requests_of(step)
        for number, (start, entries) in output.prompt_logprobs.items():
            known = completions.get(requests[number])
            if known is not None:  # not aborted meanwhile
                known[0].set_prompt_logprobs(start, entries)
        logprobs: dict[Request, list[Logprobs]] = {}
        if output.logprobs is not None:
            found = zip(requests, output.logprobs, strict=True)
            logprobs = {request: entries for request, entries in found if entries is not None}
        # The hot loop of a serving engine: attribute access is what costs.
        changed: dict[CompletionGroup, None] = {}
        ended: dict[CompletionGroup, None] = {}
        some_have_grammars = self._grammars.count > 0
        for request in self.scheduler.update(step, output.sampled, output.failed, output.spoilt):
            group, completion = completions[request]
            if request.finish_reason == "error":
                self._fail(group, self._no_numbers(group, completion))
            elif some_have_grammars:
                self._keep_to_grammar(group, completion)
            if completion.reads_tokens:
                self._read(completion, logprobs.get(request))
            if request.finish_reason is not None:
                ended[group] = None
            changed[group] = None
        # Not before: several completions of a request may have ended in this step.
        for group in ended:
            if group.finished:
                self._forget(group)
        return list(changed)

    def _keep_to_grammar(self, group: CompletionGroup, completion: Completion) -> None:
        """End a request whose grammar has ended, or was left, with its newest tokens."""
        request = completion.request
        surplus = self._grammars.surplus(request)
        if surplus is None or request.finish_reason == "stop":
            return
        if self._grammars.ended(request):
            self.scheduler.finish(request, "stop", None, surplus)
            return
        token = request.output_token_ids[-surplus]
        self.scheduler.finish(request, "error", None, surplus)
        error = GrammarError(
            f"request {group.request_id!r} has drawn token {token} behind "
            f"{request.num_output_tokens} others, which its structured_outputs does not allow: it "
            "was ended, please report this"
        )
        self._fail(group, error)

    def _fail(self, group: CompletionGroup, error: FailedRequestError) -> None:
        """End a request that cannot be finished, all its completions."""
        if group.error is not None:
            return
        for each in group.completions:
            if not each.request.is_finished:
                self.scheduler.abort(each.request.request_id)
            each.finish()
        group.error = error
        logger.error("%s; it was ended", error)

    def _no_numbers(self, group: CompletionGroup, completion: Completion) -> NonFiniteError:
        cause = "the model overflows with this prompt; compare it with another implementation"
        if self.runner.dtype is torch.float16:
            cause = "start with dtype='bfloat16' or 'float32', whose numbers reach further"
        return NonFiniteError(
            f"the logits of output token {completion.request.num_output_tokens} of request "
            f"{group.request_id!r} are not finite (NaN or infinite) in "
            f"{str(self.runner.dtype).removeprefix('torch.')}: {cause}"
        )

    def _read(self, completion: Completion, logprobs: Sequence[Logprobs] | None) -> None:
        """Give a completion the tokens that its request has got, up to a stop string."""
        request = completion.request
        tokens = request.output_token_ids[completion.num_tokens :]
        for number, token in enumerate(tokens, 1):
            entry = None if logprobs is None else logprobs[number - 1]
            stop = completion.append(token, entry, number == len(tokens))
            if stop is not None:
                self.scheduler.finish(request, "stop", stop, surplus=len(tokens) - number)
                return

    def _forget(self, group: CompletionGroup) -> None:
        del self._groups[group.request_id]
        for each in group.completions:
            del self._completions[each.request]
            self._grammars.discard(each.request)
            self._observations.ended(each.request)

    def _new_request(
        self, request_id: str, index: int, prompt: PreparedPrompt, accepted: PreparedParams,
        priority: int, seed: int,
    ) -> Request:  # fmt: skip
        params = accepted.params
        return Request(
            request_id=request_id if params.n == 1 else f"{request_id}#{index}",
            prompt_token_ids=prompt.token_ids,
            params=params,
            priority=priority,
            cache_salt=prompt.cache_salt,
            eos_token_ids=self.eos_token_ids,
            seed=seed,
            bad_words=accepted.bad_words,
        )

    def _seed(self, params: SamplingParams, index: int, ordinal: int) -> int:
        """64 bits that only the request's seed (or the engine's) and the completion decide."""
        source = (
            f"request {params.seed} {index}"
            if params.seed is not None
            else f"engine {self.config.seed} {ordinal} {index}"
        )
        digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
