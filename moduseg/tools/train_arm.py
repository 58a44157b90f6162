"""Train an ARM: a module that sharpens the features of every way to run a CLIP's last block, from masks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moduseg import pseudo_masks
from moduseg.backbones.arm import Arm, ArmRecord, ArmShape, check_widths, choose_blocks, write_arm
from moduseg.config import Config, from_hydra
from moduseg.config.arm_training import ArmTraining
from moduseg.config.construct import construct
from moduseg.devices import seed_weights
from moduseg.errors import ConfigError, MissingError
from moduseg.files import to_json_values
from moduseg.masks.encoded import MAX_WAITING_PIXELS, decode
from moduseg.pipeline.manifests import StageFolder
from moduseg.pipeline.workspace import Workspace, log
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator
from moduseg.stages.propose import Propose
from moduseg.structures import Proposals, Sample
from moduseg.tools.arm_training import HostCheck, HostWindows, compute_arm_loss
from moduseg.training.loop import Extras, fit
from moduseg.training.options import TrainingOptions

WEIGHTS = "arm.safetensors"
_OWN_GROUPS = ("arm", "training", "corrclip")


def main(cfg: DictConfig) -> int:
    """The command `train_arm`: 0 if the module was trained."""
    run(cfg)
    return 0


def run(composed: DictConfig) -> Path:
    """Train an ARM beside the hosts of one CLIP, or go on where an earlier process stopped.

    Args:
        composed: `configs/train_arm.yaml`.

    Returns:
        The file of the weights.

    Raises:
        ConfigError: a wrong setting, or hosts of several CLIPs.
        MissingError: a training split without masks, or weights that are not there.
        DataError: an image or a mask that cannot be used.
        TrainingError: the loss is not a number.
    """
    cfg, settings, options, corrclip = split_settings(composed)
    work = Workspace(cfg)
    train, check = work.dataset(work.train_split), work.dataset(work.eval_split)
    for dataset in (train, check):
        if not dataset.has_truth:
            raise MissingError(
                f"dataset: {dataset.name} {dataset.split} has no masks, which an ARM is trained and measured on; "
                "choose another data set or split"
            )
    hosts = build_hosts(work, settings.hosts, corrclip)
    first = next(iter(hosts.values()))
    sizes = first.source.sizes
    shape = ArmShape(
        deep_width=sizes.joint_width,
        shallow_width=sizes.width,
        blocks=settings.blocks or choose_blocks(sizes.depth),
        width=settings.width,
        heads=settings.heads,
        mlp_width=settings.mlp_width,
    )
    check_widths(
        shape,
        Path("arm.blocks"),
        "arm.blocks",
        shallow_width=sizes.width,
        deep_width=sizes.joint_width,
        depth=sizes.depth,
    )
    needs_proposals = any(host.needs_proposals for host in hosts.values())
    folder = StageFolder(Propose.run(cfg, work, work.train_split)) if needs_proposals else None
    identity = {
        "train": work.dataset_parts(work.train_split),
        "hosts": {name: host.digest for name, host in hosts.items()},
        "generator": to_json_values(cfg.pseudo_masks.generator),
        "corrclip": to_json_values(corrclip) if needs_proposals else None,
        "proposals": None if folder is None else folder.name,
        "flip": settings.flip,
        "label_stride": settings.label_stride,
        **work.device.key_parts(),
    }
    parts = {**identity, "shape": _to_json(shape), "training": options.key_parts()}
    artefact = work.artefact("train_arm", "arm", parts)
    data = HostWindows(train, hosts, partial(_read_proposals, folder), settings.flip, options.seed)
    measure = HostCheck(check, hosts, _Proposing(work), settings.check_images)
    with seed_weights(options.seed):
        arm = Arm(shape)
    log.info("an ARM of %d parameters beside %s, %d images", arm.num_parameters, ", ".join(hosts), len(data))
    extras = Extras(identity=identity, measure=measure, title="train_arm")
    result = fit(
        arm,
        partial(compute_arm_loss, hosts=hosts, label_stride=settings.label_stride),
        data,
        options,
        artefact.path,
        device=work.device,
        extras=extras,
    )
    output = Path(settings.output) if settings.output else artefact.path / WEIGHTS
    if work.peers.is_leader:
        record = ArmRecord(shape, f"pixel:{train.name}", first.source.digest, tuple(hosts))
        write_arm(arm, record, output)
        log.info("%s", "  ".join(f"{name} {value:.1f}" for name, value in result.measures.items()))
        log.info("ARM: %s", output)
    return output


def build_hosts(work: Workspace, names: tuple[str, ...], corrclip: Mapping[str, Any]) -> dict[str, ClipWordsGenerator]:
    """Return the generators of the hosts, which share one CLIP.

    Args:
        work: configuration and backbone.
        names: variants of the last block; `corrclip` has settings of its own.
        corrclip: generator settings of `corrclip`.

    Raises:
        ConfigError: a generator that compares no words, an unknown variant, or another CLIP.
    """
    settings = dict(work.cfg.pseudo_masks.generator)
    if settings.get("name") != "clip_dense":
        raise ConfigError(
            f"pseudo_masks.generator.name: got {settings.get('name')!r}, expected clip_dense, whose settings the hosts "
            "share; corrclip has its own: pseudo_masks@corrclip=<file>"
        )
    classes = work.dataset(work.train_split).classes
    hosts: dict[str, ClipWordsGenerator] = {}
    for name in names:
        cfg = {**corrclip} if name == "corrclip" else {**settings, "variant": name}
        cfg.pop("arm", None)
        weights = (settings.get("weights"), settings.get("revision"))
        if (cfg.get("weights"), cfg.get("revision")) != weights:
            raise ConfigError(
                f"corrclip.generator.weights: got {cfg.get('weights')!r}, expected {weights[0]!r} as of the other "
                "hosts; set corrclip.generator.weights, or leave corrclip out of arm.hosts"
            )
        host = pseudo_masks.build(cfg, work.device, lambda: work.backbone, classes, f"arm.hosts: {name}")
        if not isinstance(host, ClipWordsGenerator):
            raise ConfigError(f"arm.hosts: got {cfg.get('name')!r}, expected generators that compare words")
        if hosts:
            host.share_source(next(iter(hosts.values())).source)
        hosts[name] = host
    return hosts


class _Proposing:
    """Proposals of checked images, made when they are first asked for and kept where they are small."""

    def __init__(self, work: Workspace) -> None:
        self._work = work
        self._kept: dict[str, Proposals] = {}

    def __call__(self, sample: Sample) -> Proposals:
        if sample.id in self._kept:
            return self._kept[sample.id]
        proposals = self._work.proposer.propose(sample)
        if proposals.masks.numel() <= MAX_WAITING_PIXELS:
            self._kept[sample.id] = proposals
        return proposals


def _read_proposals(folder: StageFolder | None, sample: Sample) -> Proposals:
    """Return the stored proposals of a training image."""
    if folder is None:
        raise ConfigError("arm.hosts: got a host that needs proposals, expected them to be made")
    return decode(folder.waiting_proposals(sample.id, sample.size))


def split_settings(composed: DictConfig) -> tuple[Config, ArmTraining, TrainingOptions, dict[str, Any]]:
    """Return what `configs/train_arm.yaml` holds: a run's configuration, ARM, training, and CorrCLIP's generator.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if not isinstance(plain, dict):
        raise ConfigError("configuration: expected groups; start from configs/train_arm.yaml")
    values = {str(key): value for key, value in plain.items() if key != "hydra"}
    corrclip = values.get("corrclip")
    if not isinstance(corrclip, dict) or not isinstance(corrclip.get("generator"), dict):
        raise ConfigError("corrclip: got no generator, expected settings of CorrCLIP; pseudo_masks@corrclip=<file>")
    cfg = from_hydra({key: value for key, value in values.items() if key not in _OWN_GROUPS})
    settings = construct(ArmTraining, values["arm"], "arm")
    options = construct(TrainingOptions, values["training"], "training")
    return cfg, settings, options, corrclip["generator"]


def _to_json(shape: ArmShape) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(shape).items()}
