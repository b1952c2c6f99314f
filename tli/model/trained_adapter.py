"""What a trained adapter's folder says of its training, and whether the adapter fits a model.

``tli.train`` leaves ``report.json`` beside the adapter: the options of the run, the hashes of model, list and adapter. An evaluation
that should say something about that run uses the same split, rounding and pooling. A folder without one, another tool's for
instance, is used as it is: then nobody knows which words it was trained on.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from torch import nn

from tli.model import lora, starter
from tli.model.checkpoint import Checkpoint
from tli.model.decoder import init_empty_decoder
from tli.model.linear_map import MAP_FILE, FittedMap, load_map
from tli.model.shape import Layer
from tli.runtime.cli import flag
from tli.runtime.device import DeviceConfig
from tli.runtime.errors import TliError
from tli.runtime.files import sha256
from tli.runtime.patterns import pattern


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """An adapter off the disk with what is known of it.

    folder   where it lies
    adapter  its factors
    peft     ``adapter_config.json``
    report   ``report.json``, or None where there is none
    fitted   the map of its states, or None where there is none
    """

    folder: pathlib.Path
    adapter: lora.Adapter
    peft: dict
    report: dict | None
    fitted: FittedMap | None = None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def layer(self) -> int:
        """The layer that was aligned, as far as is known: that of the report, or the one above the adapter's last block."""
        return self.option("layer", max(int(path.split(".")[1]) for path in self.adapter.factors) + 1)

    def option(self, name: str, default):
        """An option of the training run, or ``default`` where none is recorded."""
        return default if self.report is None else self.report["config"].get(name, default)

    def model_name(self) -> str:
        """What the model that the adapter was trained on was called: a folder or a hub name."""
        if self.report is not None:
            return self.report["config"].get("model") or starter.NAME
        name = self.peft.get("base_model_name_or_path")
        if not name:
            file = self.folder / lora.CONFIG_FILE
            raise TliError(file, "the adapter must name its model", "no base_model_name_or_path", "name the model with --model")
        return name

    def model(self) -> str:
        """Where that model is to be read: the folder or hub name."""
        return starter.locate(self.model_name())

    def facts(self) -> dict:
        """Plain JSON values, for a report."""
        file = self.folder / lora.ADAPTER_FILE
        trained = (*self.adapter.factors.values(), self.adapter.magnitudes.values())
        parameters = sum(tensor.numel() for tensors in trained for tensor in tensors)
        recorded = None if self.report is None else {key: self.report[key] for key in ("config", "model", "pairs")}
        return {
            "name": self.name,
            "folder": str(self.folder),
            "sha256": sha256(file),
            "rank": self.peft["r"],
            "parameters": parameters,
            "bytes": file.stat().st_size,
            "layer": self.layer,
            "recorded": recorded,
        }


def load_adapter(folder: str | os.PathLike) -> TrainedAdapter:
    """Load an adapter in PEFT's format, with what the ``report.json`` beside it says of its training.

    Args:
        folder:  holds ``adapter_config.json`` and ``adapter_model.safetensors``

    Returns:
        The factors by module path (A fp32 [R, K], B fp32 [N, R]) in ``adapter.factors``, the scale, the aligned ``layer``, the report and
        the map, None where there is none.

    Raises:
        TliError: what ``lora.load`` refuses; a report or a map that cannot be read, or that belongs to another adapter.

    Example:
        >>> from tli import TrainConfig, load_adapter, train
        >>> run = train(TrainConfig(rank=4, layer=1, batch=256, epochs=1, no_report=True, output="adapter"))
        >>> trained = load_adapter("adapter")
        >>> lora_a, lora_b = trained.adapter.factors["layers.0.self_attn.q_proj"]
        >>> trained.layer, lora_a.shape, lora_b.shape
        (1, torch.Size([4, 576]), torch.Size([576, 4]))
    """
    folder = pathlib.Path(folder).expanduser()
    adapter = lora.load(folder)
    if not adapter.factors:
        raise TliError(folder / lora.ADAPTER_FILE, "the adapter must hold factors", "none", "save the adapter again")
    peft = json.loads((folder / lora.CONFIG_FILE).read_text(encoding="utf-8"))
    file, report = folder / "report.json", None
    if file.is_file():
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            told = report["adapter"]["sha256"]
            report["config"]["layer"], report["model"]["sha256"], report["pairs"]["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise TliError(file, "the file must be a report of tli.train", repr(error), "train again, or take the file away") from error
        if told != sha256(folder / lora.ADAPTER_FILE):
            raise TliError(file, "the report must speak of the adapter beside it", "another adapter's hash", "take the report away")
    return TrainedAdapter(folder, adapter, peft, report, _fitted(folder, report))


def _fitted(folder: pathlib.Path, report: dict | None) -> FittedMap | None:
    """The map beside an adapter; raises ``TliError`` where it is another's, or lacks though the run had one."""
    if not (folder / MAP_FILE).exists():
        if report is not None and report["config"].get("map", "none") != "none":
            must = "the map that was saved with the adapter must lie beside it"
            raise TliError(folder / MAP_FILE, must, "no such file", "put it back, or train again")
        return None
    fitted = load_map(folder)
    if fitted.report.get("adapter") != sha256(folder / lora.ADAPTER_FILE):
        raise TliError(folder / MAP_FILE, "the map must be that of the adapter beside it", "another's", "take the map away")
    return fitted


def check_compatible(recorded: TrainedAdapter, checkpoint: Checkpoint, device_config: DeviceConfig, hashed: Callable[[Layer], str]) -> None:
    """Raise ``TliError`` unless the adapter was made for this model: recorded hash and family, every key, every shape.

    hashed   ``checkpoint.sha256``, cached where several adapters ask
    """
    where = recorded.folder / lora.ADAPTER_FILE
    if recorded.report is not None:
        told, family = recorded.report["model"], checkpoint.config.model_type
        if told.get("family") != family:
            remedy = "name that model with --model"
            raise TliError(
                "--model", f"the model must be of the family that the adapter was trained on, {told.get('family')}", family, remedy
            )
        deepest: Layer = recorded.layer if recorded.option("arm", "early") == "early" else "output"
        if recorded.layer > checkpoint.blocks or told["sha256"] != hashed(deepest):
            must = f"the model must be the one that the adapter was trained on, {told.get('name')}"
            raise TliError("--model", must, f"other weights in {checkpoint.name}", "name that model with --model")
    decoder = init_empty_decoder(checkpoint, checkpoint.blocks, np.zeros(1, np.int64), device_config)
    shapes = {path: tuple(module.weight.shape) for path, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    factors, remedy = recorded.adapter.factors, "name the adapter's own model with --model"
    inside = f"{recorded.adapter.decoder}." if recorded.adapter.decoder else ""
    for path, (lora_a, lora_b) in factors.items():
        if path not in shapes:
            must = f"every key must be a linear layer's of the model, {checkpoint.config.model_type} with {checkpoint.blocks} blocks"
            raise TliError(where, must, path, remedy)
        out_features, in_features = shapes[path]
        rank, _ = lora.rank_and_scale(recorded.peft, inside + path)
        if (tuple(lora_a.shape), tuple(lora_b.shape)) != ((rank, in_features), (out_features, rank)):
            must = f"the adapter must fit the model: A {rank}x{in_features} and B {out_features}x{rank} in {path}"
            raise TliError(where, must, "A {}x{}, B {}x{}".format(*lora_a.shape, *lora_b.shape), remedy)
    # PEFT starts what is missing anew, and leaves out what is too much
    wrong = [path for path in shapes if _is_target(path, inside, recorded.peft) not in (None, path in factors)]
    if wrong:
        must, got = f"the file must hold factors for just what {lora.CONFIG_FILE} names", "factors" if wrong[0] in factors else "no factors"
        raise TliError(where, must, f"{got} for {wrong[0]}", "save the adapter again")


def common_option(adapters: list[TrainedAdapter], name: str, default):
    """The option that all adapters' runs had; several adapters are compared only where they agree."""
    values = {json.dumps(recorded.option(name, default)): recorded.option(name, default) for recorded in adapters}
    if len(values) > 1:
        must = f"adapters that are evaluated together must have been trained with the same {flag(name)}"
        raise TliError("ADAPTER", must, ", ".join(values), "evaluate them one by one")
    return next(iter(values.values()))


def _is_target(path: str, inside: str, peft: dict) -> bool | None:
    """Whether PEFT would put an adapter on the linear layer at this path of the decoder, which lies at ``inside``; None: unknown."""
    blocks, targets = peft.get("layers_to_transform"), peft.get("target_modules")
    if peft.get("exclude_modules") or not targets:
        return None
    if blocks is not None and int(path.split(".")[1]) not in ([blocks] if isinstance(blocks, int) else blocks):
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or pattern(targets, "adapter_config.json, target_modules").fullmatch(inside + path)
    return any(inside + path == target or path.endswith(f".{target}") or path == target for target in targets)
