"""``KvkeepConnector``: what vLLM loads. It delegates and decides nothing.

This is one of the two places where any exception becomes a counted miss: whatever goes wrong in
here, the engine answers as if kvkeep were not there. Importing this module starts nothing, because
vLLM imports it in its front-end process too.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import vllm.distributed.kv_transfer.kv_connector.v1.base as base

from kvkeep.client.link import Link
from kvkeep.client.prefixes import PrefixClient
from kvkeep.connector import compat
from kvkeep.connector.cartridges.depositor import Depositor
from kvkeep.connector.cartridges.insertion import install
from kvkeep.connector.cartridges.parts import make_depositor, make_library
from kvkeep.connector.cartridges.serving_side import ServingSide
from kvkeep.connector.cartridges.uses import claim_to_fail
from kvkeep.connector.identity import (
    Unsupported,
    check_policy,
    derive,
    derive_layout,
    describe,
    load_secret,
    make_form,
    start_identity,
    stored_layout,
)
from kvkeep.connector.metadata import StepMetadata, StepReport
from kvkeep.connector.scheduler.block_names import BlockNames
from kvkeep.connector.scheduler_side import SchedulerSide
from kvkeep.connector.settings import load_settings
from kvkeep.connector.step_costs import CPU_TOKENS_S, StepCosts
from kvkeep.connector.worker.attachment import Attachment
from kvkeep.connector.worker.form_mover import FormMover
from kvkeep.connector.worker.movers import BlockMover, HostMover
from kvkeep.connector.worker.side import IdleWorkerSide, WorkerSide, touch_pages
from kvkeep.connector.worker.views import view_engine_memory
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, InvariantError, RefusedError
from kvkeep.model.ids import Namespace
from kvkeep.model.layout import derive_namespace
from kvkeep.protocol import messages as m
from kvkeep.protocol.versions import VERSION

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FAILURES_MAX = 100
"""After this many exceptions kvkeep stays off: something is broken for good."""


class KvkeepConnector(base.KVConnectorBase_V1, base.SupportsHMA):  # type: ignore[misc]
    """Stores the engine's KV blocks with a kvkeep daemon and loads them back."""

    requires_kv_delivery = False
    """vLLM 0.32 may drop blocks without waiting for us."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Make one half: vLLM makes one in the scheduler's process and one in each worker.

        Raises:
            InputError: The configuration is wrong; the engine does not start.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        compat.adopt_logging()
        if not __debug__:
            raise InputError("kvkeep needs its assertions: start Python without -O")
        source = compat.host_hit_source()
        if source is not None:
            self._cache_hit_source = source
        self._settings = load_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        check_policy(vllm_config, self._settings)
        self._secret = load_secret(self._settings)
        self._config, self._cache_config = vllm_config, kv_cache_config
        self._clock = SystemClock()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | IdleWorkerSide = IdleWorkerSide()
        self._namespace: Namespace | None = None
        self._num_exceptions = 0
        try:
            self._engine_layout = derive_layout(vllm_config, kv_cache_config)
            self._form = make_form(self._engine_layout, self._settings)
            self._layout = stored_layout(self._engine_layout, self._form)
            self._namespace = derive(vllm_config, self._layout, self._settings, self._secret)
        except Unsupported as reason:
            if self._settings.cartridges:
                raise InputError(
                    f"this engine can't serve cartridges ({reason}): leave cartridges out"
                ) from reason
            log.error("kvkeep is switched off for this engine: %s", reason)  # noqa: TRY400
            return
        if role == base.KVConnectorRole.SCHEDULER:
            self._scheduler = self._make_scheduler(self._namespace)

    def _make_scheduler(self, namespace: Namespace) -> SchedulerSide:
        engine_id = str(self._config.kv_transfer_config.engine_id)
        started = start_identity(self._config)
        words = describe(self._config, self._layout, self._settings, self._secret)
        hello = m.Hello(VERSION, "scheduler", engine_id, namespace=namespace, identity=words)
        link = Link(self._settings.socket, lambda: hello)
        link.wait(self._settings.start_wait_s)
        prefixes = PrefixClient(
            link,
            self._clock,
            lease_s=self._settings.lease_s,
            patience_s=self._settings.patience_ms / 1e3,
        )
        make_side: Callable[..., SchedulerSide] = SchedulerSide
        if self._settings.serves_cartridges:
            library = make_library(self._config, self._cache_config, self._settings, words)
            make_side = functools.partial(ServingSide, library=library)
        side = make_side(
            namespace=namespace,
            block_tokens=self._layout.block_tokens,
            num_ranks=self._config.parallel_config.tensor_parallel_size,
            settings=self._settings,
            prefixes=prefixes,
            clock=self._clock,
            reset_namespace=lambda n: derive_namespace(
                self._layout,
                {"before": namespace.hex(), "reset": f"{started} {n}"},
                self._settings.tenant,
            ),
        )
        if self._secret is not None:
            side.chain_key = self._secret.chain_key
        if self._settings.announce_blocks and compat.has_events(self._config):
            side.names = BlockNames(self._layout.block_tokens)
        is_cpu = self._config.device_config.device_type == "cpu"
        side.shares_cores = is_cpu and self._config.parallel_config.tensor_parallel_size > 1
        side.costs = StepCosts(
            self._layout.block_tokens,
            assumed_tokens_s=CPU_TOKENS_S if is_cpu else 0.0,
            step_tokens_max=self._config.scheduler_config.max_num_batched_tokens,
            is_pinned=self._settings.planner == "load",
        )
        return side

    def _guard(
        self, what: Callable[[], Result], otherwise: Result, *, is_duty: bool = False
    ) -> Result:
        """Run one hook; an exception is logged, counted, and answered with ``otherwise``.

        What gives back blocks or leases is a duty: it runs even when kvkeep stays off.
        """
        if self._num_exceptions >= FAILURES_MAX and not is_duty:
            return otherwise
        try:
            return what()
        except Exception as error:
            self._num_exceptions += 1
            log.exception("kvkeep failed and is passed by. count=%d", self._num_exceptions)
            if isinstance(error, InvariantError):
                self._num_exceptions = FAILURES_MAX
            return otherwise

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Head-major, so that a head of a block is one run of bytes.

        vLLM asks this in its front-end too, also where no entry point of ours was run.
        """
        install()
        return compat.head_major_layout()

    # ---- scheduler side

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Remember vLLM's pool of blocks."""
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        """Ask the daemon for the request's prefix."""
        side = self._scheduler
        if side is not None:
            self._guard(lambda: side.add_request(request), None)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded before the forward pass of the step that runs the request."""
        side = self._scheduler
        if side is None:
            return 0, False
        miss: int | None = 0
        if self._settings.cartridges:
            miss = claim_to_fail(request, self._layout.block_tokens)
        found = self._guard(lambda: side.match(request, num_computed_tokens), miss)
        return found, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load.

        vLLM has counted these tokens as computed; should the plan fail, a load that is bound to
        fail takes its place, and vLLM computes them.
        """
        side = self._scheduler
        if side is None:
            return
        is_planned = self._guard(
            lambda: side.allocated(request, blocks, num_external_tokens), False
        )
        if not is_planned and num_external_tokens:
            side.plan_failure(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """This step's loads and stores."""
        side = self._scheduler
        if side is None:
            return StepMetadata(b"", b"", 0)
        metadata = side.build_metadata()
        if not self._guard(lambda: side.plan_stores(scheduler_output, metadata), False):
            side.stop_storing()
        return metadata

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in what the ranks report."""
        side = self._scheduler
        if side is None:
            return
        report = connector_output.kv_connector_worker_meta
        report = report if isinstance(report, StepReport) else None
        bad_block_ids = connector_output.invalid_block_ids
        self._guard(lambda: side.take_report(report, bad_block_ids), None, is_duty=True)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; its blocks may be freed at once."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; its blocks may be freed at once: stores hold their own references.

        A prefill that is handed over through the pool answers with its ticket.
        """
        side = self._scheduler
        if side is None:
            return False, None
        nothing: dict[str, Any] | None = None
        return False, self._guard(lambda: side.finish_request(request), nothing, is_duty=True)

    def has_pending_push_work(self) -> bool:
        """Keep the engine stepping until the blocks of the last stores are given back."""
        return self._scheduler is not None and self._scheduler.has_stores_in_flight

    def take_events(self) -> Iterable[Any]:
        """What blocks that were stored or found are of, where that is to be announced."""
        names = None if self._scheduler is None else self._scheduler.names
        if names is None:
            return ()
        block_tokens = self._layout.block_tokens
        nothing: list[Any] = []
        return self._guard(
            lambda: [compat.block_named(named, block_tokens) for named in names.take()], nothing
        )

    def reset_cache(self) -> bool | None:
        """Load nothing that was stored before; the shared pool itself is not wiped."""
        side = self._scheduler
        if side is None:
            return True

        def reset() -> bool:
            side.reset()
            return True

        return self._guard(reset, False, is_duty=True)

    # ---- worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Find the engine's blocks, find the daemon, and prove the path between them.

        Raises:
            RefusedError: The daemon's pool has another layout; the engine does not start.
            InputError: Blocks in this memory can't be stored in the form that is asked for.
        """
        namespace = self._namespace
        if namespace is None:
            return
        parallel = self._config.parallel_config
        tp_size = parallel.tensor_parallel_size
        try:
            memory = view_engine_memory(
                kv_caches,
                self._cache_config.num_blocks,
                self._engine_layout,
                tp_rank=parallel.rank % tp_size,
                tp_size=tp_size,
            )
        except Unsupported as reason:
            log.error("kvkeep is switched off for this engine: %s", reason)  # noqa: TRY400
            return
        mover = self._make_mover(memory)
        touch_pages(memory)
        engine_id = str(self._config.kv_transfer_config.engine_id)
        attachment = Attachment(self._settings.socket, self._layout, engine_id, mover.map_pool)
        found = attachment.link.wait(self._settings.start_wait_s)
        if attachment.link.refusal is not None:
            attachment.close()
            raise RefusedError(attachment.link.refusal)
        worker = WorkerSide(
            namespace=namespace,
            memory=memory,
            mover=mover,
            attachment=attachment,
            clock=self._clock,
            lease_s=self._settings.lease_s,
            patience_s=self._settings.patience_ms / 1e3,
        )
        if self._settings.serves_cartridges:
            worker.depositor = self._make_depositor(memory, attachment)
        self._worker = worker
        if found is None:
            log.warning("no kvkeep daemon at %s: the engine serves without, and joins it later",
                        self._settings.socket)  # fmt: skip
        elif self._guard(worker.prove_pool, None) is not None:
            log.info("kvkeep serves: layers, heads and pool proven by the start-up canary")

    def _make_depositor(self, memory: Any, attachment: Attachment) -> Depositor:
        return make_depositor(
            attachment,
            memory,
            functools.partial(self._make_mover, may_read_pool=False),
            layers=compat.attention_layers(self._config),
            clock=self._clock,
            settings=self._settings,
        )

    def _make_mover(self, memory: Any, *, may_read_pool: bool = True) -> BlockMover:
        if memory.device.type == "cpu":
            if self._form is not None:
                return FormMover(memory, self._form)
            return HostMover(memory, self._settings.copy_threads)
        if self._form is not None:
            raise InputError(
                f"kv_form {self._settings.kv_form} needs an engine whose KV lies in host memory, "
                f"and this one's lies on {memory.device.type}: leave kv_form out"
            )
        if self._settings.gpu_copies == "direct" and may_read_pool:
            from kvkeep.connector.worker.direct_mover import DirectMover

            if DirectMover.fits(memory):
                return DirectMover(memory)
            log.warning("gpu_copies: direct needs KV whose layers are whole words: staged is used")
        from kvkeep.connector.worker.cuda_mover import CudaMover

        return CudaMover(memory)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Hand out the stores that another engine waits for.

        vLLM calls this first in every step. 0.32 calls everything else after the forward pass of a
        step without loads, and that pass may be a long prompt's.
        """
        worker = self._worker
        if isinstance(kv_connector_metadata, StepMetadata):
            metadata = kv_connector_metadata
            self._guard(lambda: worker.store_urgent(metadata), False)

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Begin the loads of a step, or report what can't be loaded.

        vLLM 0.32 calls this after the forward pass where a step has nothing to load.
        """
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, StepMetadata):
            return
        worker = self._worker
        if not self._guard(lambda: worker.load(metadata), False):
            worker.fail_loads(metadata)
        if worker.is_loading and not compat.calls_layers(forward_context):
            self.wait_for_layer_load("")
        # Here too: vLLM 0.26 calls no ``wait_for_save`` in a step without a forward pass.
        self._store(metadata)

    def _store(self, metadata: StepMetadata) -> None:
        worker = self._worker
        if not self._guard(lambda: worker.store(metadata), False):
            worker.skip_stores(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Have what the engine launches from here on wait for a layer's blocks.

        Should that fail, the step computes from what is not there, and is reported so.
        """
        worker = self._worker
        if worker.is_loading:
            self._guard(lambda: worker.wait_for_layer(layer_name), None)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Whole blocks are stored after the forward pass."""

    def wait_for_save(self) -> None:
        """Hand the stores to their thread, if that is still to do; nothing is waited for."""
        metadata = self._get_connector_metadata()
        if isinstance(metadata, StepMetadata):
            self._store(metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """No transfer here outlives its step."""
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM must compute after all."""
        self._finish_loads()
        return self._worker.take_bad_block_ids()

    def build_connector_worker_meta(self) -> StepReport | None:
        """This rank's report."""
        self._finish_loads()
        return self._worker.take_report()

    def _finish_loads(self) -> None:
        """Wait until nothing is on its way; their slots are given back by the report."""
        worker = self._worker
        if worker.is_loading and not self._guard(worker.finish_loads, False, is_duty=True):
            metadata = self._get_connector_metadata()
            if isinstance(metadata, StepMetadata):
                worker.fail_loads(metadata)

    def get_handshake_metadata(self) -> None:
        """None: MultiConnector would hand it to its other children."""
        return

    def shutdown(self) -> None:
        """Stop threads and end the sessions."""
        if self._scheduler is not None:
            self._scheduler.close()
        self._worker.close()
