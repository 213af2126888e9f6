"""The scheduler side of an engine that serves cartridges.

What a request waits for here: its cartridge is found and checked (a thread reads the file), its
prompt compared, its blocks brought to the pool where they are missing. Then it is loaded like any
prefix. A request whose prompt holds no document text runs on its cartridge's KV or fails; one whose
prompt holds the text is computed where the cartridge can't be had. On the engine core's thread.
"""

import contextlib
import logging
from concurrent.futures import Future
from typing import Any

from kvkeep.cartridges.dispatch.salting import client_part
from kvkeep.cartridges.store.claims import Asked, claim, find_asked
from kvkeep.cartridges.store.library import Checked, Library
from kvkeep.connector import compat
from kvkeep.connector.cartridges.uses import TRIES_MAX, Deposits, Use, keep_apart, salt_of
from kvkeep.connector.metadata import StepMetadata, StepReport
from kvkeep.connector.scheduler.requests import RequestState, skips_cache
from kvkeep.connector.scheduler_side import SchedulerSide
from kvkeep.model.errors import InputError, KvkeepError, RefusedError, UnavailableError
from kvkeep.model.ids import Namespace

log = logging.getLogger(__name__)

LOOKUP_WAIT_S = 0.002
"""A new request waits so long for a cartridge that is known already; others come later."""


class ServingSide(SchedulerSide):
    """Decides; see `SchedulerSide`."""

    def __init__(self, *, library: Library, **more: Any) -> None:
        """Make it.

        Args:
            library: Of the cartridges that requests may name.
            more: As `SchedulerSide`.
        """
        super().__init__(**more)
        self._library = library
        self._uses: dict[str, Use] = {}
        self._deposits = Deposits(self._clock, self._num_ranks)
        self._kept: dict[tuple[Namespace, bytes], tuple[object, bool]] = {}
        """Last block of each list that the daemon was told of: in which session, and its pin."""

    # ---- arrival

    def add_request(self, request: Any) -> None:
        """A request arrived; one that names a cartridge has it looked up first."""
        try:
            asked = find_asked(request.kv_transfer_params)
        except InputError as error:
            self._begin_refused(request, str(error))
            return
        if asked is None:
            keep_apart(request)
            super().add_request(request)
            return
        use = Use(asked, request.cache_salt, self._library.look_up(asked.cartridge_id))
        self._uses[request.request_id] = use
        # Until it is known which cartridge it is, it shares nothing with anybody.
        compat.salt(request, f"{asked.cartridge_id} {request.request_id}")
        self._settle(request, use, LOOKUP_WAIT_S)

    def _begin_refused(self, request: Any, reason: str) -> None:
        use = Use(Asked("unknown"), request.cache_salt, Future())
        self._uses[request.request_id] = use
        self._refuse(request, use, reason)

    def _settle(self, request: Any, use: Use, wait_s: float = 0.0) -> None:
        """Take the library's answer, if it is there."""
        try:
            checked = use.lookup.result(timeout=wait_s)
            self._compare(request, use, checked)
        except TimeoutError:
            return
        except KvkeepError as error:
            is_refusal = not isinstance(error, UnavailableError)
            self._fail(request, use, str(error), is_refusal=is_refusal)
            return
        if skips_cache(request):
            why = "logprobs of the whole prompt are asked for"
            self._fail(request, use, why, is_refusal=False)
            return
        compat.salt(request, salt_of(checked.digest, use.own_salt))
        super().add_request(request)

    def _compare(self, request: Any, use: Use, checked: Checked) -> None:
        """See how much of the prompt the cartridge is.

        Raises:
            RefusedError: It is not, or can't be.
        """
        if request.lora_request is not None:
            raise RefusedError(
                "a cartridge holds KV of the model itself: leave the LoRA adapter or it out"
            )
        is_odd = getattr(request, "prompt_embeds", None) is not None or request.mm_features
        if is_odd or getattr(request, "resumable", False):
            raise RefusedError("a cartridge goes with prompts of whole text only")
        prompt = list(request.prompt_token_ids)
        found = claim(use.asked, checked.manifest, checked.token_ids, prompt, self._block_tokens)
        if found.is_strict and not self._settings.cartridges:
            raise RefusedError(
                "this engine computes what it can't load: set cartridges: true and "
                "kv_load_failure_policy fail for cartridges that are put in front of prompts"
            )
        if found.is_strict and skips_cache(request):
            raise RefusedError("logprobs of a cartridge's own tokens can't be had: ask for none")
        use.claim, use.checked = found, checked

    def _extras_of(self, request: Any) -> dict[str, str]:
        """What besides token ids decides a request's KV; a cartridge does."""
        use = self._uses.get(request.request_id)
        extras = super()._extras_of(request)
        if use is None or use.checked is None:
            return extras
        extras.pop("salt", None)
        own = client_part(use.checked.digest, use.own_salt)
        if own:
            extras["salt"] = own
        # A tag of its own: no client can write it, whatever salt it sends.
        return extras | {"cartridge": use.checked.digest}

    # ---- what becomes of a request without its cartridge

    def _fail(self, request: Any, use: Use, reason: str, *, is_refusal: bool) -> None:
        """Compute the request as text where that is right, and else let it fail.

        Args:
            request: vLLM's.
            use: Its cartridge.
            reason: One sentence.
            is_refusal: It can't have this cartridge, now or later; else it can't be had now.
        """
        is_text = use.asked.mode == "replace" or use.checked is not None
        is_text &= not use.claim.is_strict and not use.asked.num_inserted
        if self._settings.cartridges and (is_refusal or not is_text):
            self._refuse(request, use, reason)
            return
        log.warning("kvkeep: computed without a cartridge: %s. request=%s", reason[:300],
                    request.request_id)  # fmt: skip
        self._forget(request)
        compat.salt(request, use.own_salt)
        keep_apart(request)
        super().add_request(request)

    def _refuse(self, request: Any, use: Use, reason: str) -> None:
        """Have the request fail: it claims a block that no rank will bring."""
        log.error("kvkeep: request %s fails: %s", request.request_id, reason[:300])
        self._drop_state(request)
        use.refusal, use.deposit = reason, None
        # vLLM asks no connector about requests that skip the cache.
        compat.read_cache(request)
        compat.salt(request, f"refused {request.request_id}")

    def _forget(self, request: Any) -> None:
        self._uses.pop(request.request_id, None)
        self._drop_state(request)

    def _drop_state(self, request: Any) -> None:
        state = self._requests.pop(request.request_id, None)
        if state is not None:
            self._drop_lease(state)

    # ---- lookup

    def match(self, request: Any, num_computed_tokens: int) -> int | None:
        """As `SchedulerSide.match`; of a cartridge all, or it fails or is computed."""
        use = self._uses.get(request.request_id)
        if use is None:
            return super().match(request, num_computed_tokens)
        if use.refusal:
            num_left = int(request.num_tokens) - 1 - num_computed_tokens
            return max(0, min(self._block_tokens, num_left))
        if use.checked is None:
            self._settle(request, use)
            # Its salt is another now than when vLLM looked into its own cache.
            return None
        if self._is_early(use):
            return None
        found = super().match(request, num_computed_tokens)
        if found is None:
            return None
        use.num_local_blocks = num_computed_tokens // self._block_tokens
        if num_computed_tokens + found >= self._num_wanted(request, use) * self._block_tokens:
            self._keep(request, use)
            return found
        self._bring(request, use)
        return None

    def _is_early(self, use: Use) -> bool:
        if use.deposit is not None and use.deposit.is_open:
            return not self._deposits.is_overdue(use.deposit)
        return self._clock.now_s() < use.ask_after_s

    def _num_wanted(self, request: Any, use: Use) -> int:
        """Blocks of the cartridge that the request has to have."""
        num_tokens = min(use.claim.num_tokens, int(request.num_tokens) - 1)
        return num_tokens // self._block_tokens

    def _bring(self, request: Any, use: Use) -> None:
        """Blocks are missing: have them brought, or give the cartridge up."""
        state = self._requests.get(request.request_id)
        deposit, use.deposit = use.deposit, None
        assert use.checked is not None
        why = ""
        if state is None or not (self._settings.load and state.may_load):
            why = "what was loaded for it did not arrive, or this engine loads nothing"
        elif not self._prefixes.is_connected:
            why = "there is no daemon"
        elif deposit is not None and deposit.is_open:
            why = "its blocks were not brought in time"
        elif deposit is not None and deposit.error:
            why = deposit.error
        elif deposit is None and use.num_tries >= TRIES_MAX:
            why = "the pool has no room for it, or others need it: raise pool_bytes of the daemon"
        if state is None or why:
            cartridge_id = use.asked.cartridge_id
            why = f"cartridge {cartridge_id} is not at hand: {why}"
            self._fail(request, use, why, is_refusal=False)
            return
        self._drop_lease(state)
        state.is_asked = False
        if deposit is not None:
            use.pause(self._clock.now_s())
            return
        hashes = state.hasher.hashes[: self._num_wanted(request, use)]
        use.num_tries += 1
        use.deposit = self._deposits.begin(use.checked, hashes)
        # Whatever the daemon knew of these blocks is of those that are gone.
        self._kept.pop((self._namespace, bytes(hashes[-1])), None)

    def _keep(self, request: Any, use: Use) -> None:
        """Tell the daemon once which blocks are a cartridge's, and whether they are pinned."""
        num_blocks = self._num_wanted(request, use)
        state = self._requests.get(request.request_id)
        if not num_blocks or state is None or use.checked is None:
            return
        use.num_tries = 0
        hashes = state.hasher.hashes[:num_blocks]
        key = (self._namespace, bytes(hashes[-1]))
        told = (self._prefixes.session, use.checked.is_pinned)
        if self._kept.get(key) == told:
            return
        self._kept[key] = told
        self._prefixes.keep_cartridge(
            use.checked.manifest.cartridge_id,
            use.checked.digest,
            self._namespace,
            hashes,
            is_pinned=use.checked.is_pinned,
        )

    def _is_load_worth(self, state: RequestState, num_tokens: int) -> bool:
        """A cartridge's KV is loaded, whatever that costs."""
        return state.request.request_id in self._uses or super()._is_load_worth(state, num_tokens)

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> bool:
        """VLLM gave the request its blocks; see to it that none of its cartridge is computed."""
        use = self._uses.get(request.request_id)
        state = self._requests.get(request.request_id)
        if use is None or state is None:
            return super().allocated(request, blocks, num_external_tokens)
        num_wanted = self._num_wanted(request, use)
        num_there = use.num_local_blocks + -(-num_external_tokens // self._block_tokens)
        if use.claim.is_strict and num_there < num_wanted:
            # vLLM took less than was offered; the plug-in has what it took fail.
            log.error("kvkeep: vLLM would compute a cartridge. request=%s", request.request_id)
            self._drop_state(request)
            return False
        is_planned = super().allocated(request, blocks, num_external_tokens)
        # The cartridge's own blocks are never stored from what an engine computed.
        state.num_stored = max(state.num_stored, num_wanted)
        return is_planned

    # ---- steps

    def build_metadata(self) -> StepMetadata:
        """As `SchedulerSide`, with the cartridges that ranks are to bring."""
        metadata = super().build_metadata()
        metadata.deposits = self._deposits.take_jobs()
        return metadata

    def plan_stores(self, scheduler_output: Any, metadata: StepMetadata) -> bool:
        """As `SchedulerSide`; ranks that have nothing else to do leave their cores to a deposit."""
        is_planned = super().plan_stores(scheduler_output, metadata)
        if self.shares_cores and not scheduler_output.num_scheduled_tokens:
            metadata.may_rest |= any(use.deposit is not None for use in self._uses.values())
        return is_planned

    def take_report(self, report: StepReport | None, bad_block_ids: Any) -> None:
        """What the ranks did in a step that has ended."""
        super().take_report(report, bad_block_ids)
        if report is None:
            return
        for job_id, result in report.deposits.items():
            self._deposits.take_result(job_id, result)
        for req_id, load in report.loads.items():
            state = self._requests.get(req_id)
            if req_id in self._uses and load.bad_blocks and state is not None:
                # What is computed in the place of a cartridge is not its KV.
                state.may_store = False

    def finish_request(self, request: Any) -> dict[str, Any] | None:
        """A request ended, in whatever way."""
        use = self._uses.pop(request.request_id, None)
        if use is not None:
            use.lookup.cancel()
        return super().finish_request(request)

    def close(self) -> None:
        """End the session with the daemon."""
        with contextlib.suppress(RuntimeError):
            self._library.close()
        super().close()
