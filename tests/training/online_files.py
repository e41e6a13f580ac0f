"""vLLM's weight transfer with files in place of the wire: all of the way but the transport itself, on a CPU.

The engine's side is a backend `files` of vLLM's own factory; the trainer's packs vLLM's buckets and writes each down.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from psycho.inference.pool import _PoolWorker

BUCKET = 40_000  # bytes
CONFIG = {"weight_transfer_config": {"backend": "files"}}


class FilesWorker(_PoolWorker):
    """The pool's worker, whose process knows the backend."""

    def _start(self, folder: str, runner: str) -> Any:
        register()
        return super()._start(folder, runner)


def register() -> None:
    """Let vLLM of this process know the backend."""
    from dataclasses import make_dataclass

    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    # Made so because the decorator looks for the module of its class, which the worker does not have.
    init_info = make_dataclass("Init", [("rank_offset", int)], bases=(WeightTransferInitInfo,))
    update_info = make_dataclass("Update", [("file", str)], bases=(WeightTransferUpdateInfo,))

    class Files(WeightTransferEngine):  # type: ignore[type-arg, misc]
        init_info_cls, update_info_cls = init_info, update_info

        def init_transfer_engine(self, info: Any) -> None:
            self.ready = True

        def start_weight_update(self) -> None:
            assert self.ready
            initialize_layerwise_reload(self.model)

        def update_weights(self, info: Any) -> None:
            self.receive_weights(self.parse_update_info(info))  # without an accelerator to wait for

        def receive_weights(self, info: Any) -> None:
            self.model.load_weights(load_file(info.file).items())

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory._registry["files"] = lambda: Files


class FilesSender:
    """The trainer's side: as vLLM's, one bucket after the other."""

    def __init__(self, client: Any, source: Any, folder: Path) -> None:
        self.client, self.source, self.folder = client, source, folder
        self.sent: list[list[str]] = []
        client.init_weight_transfer_engine({"rank_offset": 1})

    def send_weights(self) -> None:
        from safetensors.torch import save_file
        from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

        pairs = iter(self.source)
        names = []
        self.client.start_weight_update()
        while (bucket := pack_tensors(pairs, lambda pair: pair[1], BUCKET)) is not None:
            file = self.folder / f"{uuid.uuid4().hex}.safetensors"
            whole = unpack_tensor(bucket.packed_tensor, bucket.names, bucket.shapes, bucket.dtypes, bucket.tensor_sizes)
            save_file({name: value.clone() for name, value in whole}, file)
            self.client.update_weights({"file": str(file)})
            names.append(bucket.names)
        self.client.finish_weight_update()
        self.sent = names
