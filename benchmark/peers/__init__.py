"""Other projects' caches, run in the same rows as ours: what each is, and its settings.

A peer is its package's own code, set up as its documentation says: the step count, the branches of
classifier-free guidance and a fresh state for every picture are told to it where it asks for them.
Those named ``paper:`` have no package for these models: here they are written from their papers.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.errors import BenchmarkError

ALL = ("flux", "pixart", "dit")
WITH_WAN = (*ALL, "wan")
WITH_WAN_AND_SD3 = (*WITH_WAN, "sd3")
TRANSFORMERS = (*ALL, "opensora")
EVERY = (*TRANSFORMERS, "sd", "sd3", "wan")
EXTRA = "pip install 'xfuser_adacorr[peers]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerConfig:
    """A peer with one setting of its options."""

    name: str
    """As in ``--cache_methods``."""
    options: tuple[tuple[str, Any], ...] = ()
    """Sorted by name, hashable."""
    true_cfg: bool = False
    """Whether the unguided branch is a call of its own in every step, as true guidance is."""
    calibration: str | None = None
    """File of what was calibrated for these options, where the peer asks for it."""

    def to_dict(self) -> dict[str, Any]:
        return {"peer": self.name, "options": dict(self.options), "true_cfg": self.true_cfg}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One method of another project."""

    name: str
    """PACKAGE:METHOD."""
    module: str
    """Its functions ``enable(pipe, options, run)``, by method, in `benchmark.peers`."""
    families: tuple[str, ...] = ALL
    reason: str = ""
    """Why the other families are left out."""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """Options that its project gives as default or in its example for FLUX."""
    one_branch: bool = False
    """Whether it cannot tell the calls of two branches apart."""
    calibrated: bool = False
    """Whether its module has a ``CALIBRATE`` for it."""

    @property
    def package(self) -> str:
        return self.name.partition(":")[0]

    @property
    def method(self) -> str:
        return self.name.partition(":")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a peer is told about the pictures to be made."""

    num_inference_steps: int
    true_cfg: bool
    calibration: Any = None
    """What its ``CALIBRATE`` gave."""


PAPER = "paper:"
"""Before the names of methods that are written here from their papers."""
_UNKNOWN_BLOCKS = "diffusers' hooks do not know its blocks"
_NO_ADAPTER = "cache-dit has no adapter of it"
_NO_TEXT_AT_THE_END = "; on Stable Diffusion 3 it fails, whose last block returns no text states"
_ASKS_FOR_TEXT = {"families": WITH_WAN, "reason": _UNKNOWN_BLOCKS + _NO_TEXT_AT_THE_END}
"""Of diffusers' hooks that ask every block for text states."""
_FLUX_ALONE = "xfuser's caches wrap the blocks of FLUX alone"
_DBCACHE = {"Fn_compute_blocks": 8, "max_warmup_steps": 8, "residual_diff_threshold": 0.08}


def _diffusers(method: str, recommended: Mapping[str, Any], **more: Any) -> Peer:
    more = {"families": WITH_WAN_AND_SD3, "reason": _UNKNOWN_BLOCKS, **more}
    return Peer(
        name=f"diffusers:{method}", module="diffusers_hooks", recommended=recommended, **more
    )


def _cache_dit(method: str, recommended: Mapping[str, Any] = _DBCACHE, **more: Any) -> Peer:
    more = {"families": WITH_WAN, "reason": _NO_ADAPTER + _NO_TEXT_AT_THE_END, **more}
    return Peer(
        name=f"cache-dit:{method}", module="cache_dit_blocks", recommended=recommended, **more
    )


def _xfuser(method: str) -> Peer:
    return Peer(
        name=f"xfuser:{method}",
        module="xfuser_blocks",
        families=("flux",),
        reason=_FLUX_ALONE,
        recommended={"rel_l1_thresh": 0.12},
        one_branch=True,
    )


def _paper(method: str, module: str, recommended: Mapping[str, Any], **more: Any) -> Peer:
    more = {"families": EVERY, **more}
    return Peer(name=f"{PAPER}{method}", module=module, recommended=recommended, **more)


def _paper_inside(method: str, module: str, recommended: Mapping[str, Any]) -> Peer:
    return _paper(
        method,
        module,
        recommended,
        families=TRANSFORMERS,
        reason="where its list of blocks begins and ends is not described here",
        one_branch=True,
    )


PEERS = {
    peer.name: peer
    for peer in (
        _diffusers("FirstBlockCache", {"threshold": 0.05}, **_ASKS_FOR_TEXT),
        _diffusers("TaylorSeer", {"cache_interval": 5}),
        _diffusers("TaylorSeer2", {"cache_interval": 5}),
        _diffusers("TaylorSeerLite", {"cache_interval": 5}, **_ASKS_FOR_TEXT),
        _diffusers("TaylorSeerLite2", {"cache_interval": 5}, **_ASKS_FOR_TEXT),
        _diffusers("MagCache", {"threshold": 0.06, "max_skip_steps": 3, "retention_ratio": 0.2}),
        _diffusers(
            "FasterCache",
            {"skip_range": 2, "timestep_range": (-1, 681)},
            families=("flux", "pixart"),
            reason="FasterCache takes the guided half of a batch to be the second, in DiT it is "
            "the first; it cannot tell the two calls of Wan's guidance apart; and it does not know "
            "the attention of Open-Sora and Stable Diffusion 3",
        ),
        _diffusers(
            "PyramidAttentionBroadcast",
            {"skip_range": 2, "timestep_range": (100, 800)},
            families=(*ALL, "sd3"),
            reason="diffusers' hooks do not know its attention, or, of Wan, keep one state for "
            "the two calls of its guidance",
        ),
        _diffusers("SeaCache", {"threshold": 0.25}, **_ASKS_FOR_TEXT),
        _cache_dit("DBCache", families=WITH_WAN_AND_SD3, reason=_NO_ADAPTER),
        _cache_dit("DBCache+TaylorSeer"),
        _cache_dit("DBCache+TaylorSeer2"),
        _cache_dit("DBCache+FoCa"),
        _cache_dit("DBCache+DMD"),
        _cache_dit(
            "StepsMask+TaylorSeer",
            {**_DBCACHE, "mask_policy": "medium", "steps_computation_policy": "dynamic"},
        ),
        _xfuser("fbcache"),
        _xfuser("teacache"),
        _paper("MeanCache", "mean_cache", {"share": 0.3, "exponent": 4.0}, calibrated=True),
        _paper("DPCache", "dp_cache", {"share": 0.26, "order": 2}, calibrated=True),
        _paper("Spectrum", "spectrum", {"warm_up": 5, "growth": 0.75}),
        _paper("L2P", "l2p", {"interval": 5}, calibrated=True),
        _paper("OLSS", "olss", {"share": 0.25}, calibrated=True),
        _paper("BudCache", "bud_cache", {"share": 0.35}, calibrated=True),
        _paper("BAG", "bag", {"share": 0.26}, calibrated=True),
        _paper("EasyCache", "easy_cache", {"threshold": 0.2}),
        _paper("LazyCache", "easy_cache", {"threshold": 0.2}),
        _paper_inside("DiCache", "di_cache", {"threshold": 0.4, "retained": 0.2}),
        _paper_inside("TCPade", "tc_pade", {"interval": 8, "turn": 1.4, "start": 4}),
    )
}
"""By name."""

_IMPORTS = {
    "diffusers": "diffusers.hooks",
    "cache-dit": "cache_dit",
    "xfuser": "xfuser",
    "paper": "benchmark",
}


def is_peer(name: str) -> bool:
    return name in PEERS


def is_installed(peer: Peer) -> bool:
    return importlib.util.find_spec(_IMPORTS[peer.package].partition(".")[0]) is not None


def check(name: str, family: str, *, true_cfg: bool = False) -> None:
    """`BenchmarkError` that names a peer which cannot run here, and why."""
    peer = PEERS[name]
    if family not in peer.families:
        raise BenchmarkError(
            f"{name} has no family {family!r}: {peer.reason}; accepted: {', '.join(peer.families)}"
        )
    if not is_installed(peer):
        raise BenchmarkError(f"{name} needs the package {peer.package}: {EXTRA}")
    if true_cfg and peer.one_branch:
        raise BenchmarkError(
            f"{name} keeps one state for both branches of --true_cfg_scale; accepted: 1"
        )


def available(family: str, *, true_cfg: bool = False) -> tuple[list[str], list[str]]:
    """Names of the peers that can run here, and what is said of the others."""
    names, missing = [], []
    for name in PEERS:
        try:
            check(name, family, true_cfg=true_cfg)
        except BenchmarkError as error:
            missing.append(str(error))
        else:
            names.append(name)
    return names, missing


def peer_config(name: str, options: Mapping[str, Any] | None = None) -> PeerConfig:
    """A peer with these options, or its recommended ones."""
    given = PEERS[name].recommended if options is None else options
    return PeerConfig(name=name, options=tuple(sorted(given.items())))


@contextmanager
def enabled(pipe: Any, config: PeerConfig, num_inference_steps: int) -> Iterator[None]:
    """The pipeline under a peer; afterwards it is as it was.

    Raises:
        BenchmarkError: the peer refuses the pipeline, in its own words.
    """
    from benchmark.peers.restoring import restored

    peer = PEERS[config.name]
    module = _module(peer)
    kept = config.calibration and json.loads(Path(config.calibration).read_text())
    run = Run(num_inference_steps=num_inference_steps, true_cfg=config.true_cfg, calibration=kept)
    with restored(pipe):
        try:
            disable = module.ENABLE[peer.method](pipe, dict(config.options), run)
        except (ImportError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise BenchmarkError(f"{config.name}: {' '.join(str(error).split())}") from error
        try:
            yield
        finally:
            disable()


def _module(peer: Peer) -> Any:
    return importlib.import_module(f"benchmark.peers.{peer.module}")


def calibration_of(config: PeerConfig) -> tuple[str, Callable[..., Any]] | None:
    """What a peer has to be told about model and sampler: its name, and how it is found.

    The function takes the samples of `benchmark.run.trajectories` and the number of steps. None
    for a peer that is told nothing.
    """
    peer = PEERS[config.name]
    if not peer.calibrated:
        return None
    make, relevant = _module(peer).CALIBRATE[peer.method]
    options = dict(config.options)
    told = "-".join(f"{name}-{options[name]}" for name in relevant if name in options)
    return f"{peer.method}-{told}".strip("-"), lambda samples, steps: make(samples, options, steps)


def sweep_options(name: str, listed: Sequence[Mapping[str, Any]], steps: int) -> list[dict]:
    """The settings of a peer that a sweep tries, its recommended ones first.

    Args:
        listed: what a sweep of our ``Fb`` tries: thresholds of the same relative change.
        steps: of the run.
    """
    from benchmark.peers.sweeps import settings_of

    peer = PEERS[name]
    thresholds = [options["rel_l1_thresh"] for options in listed]
    tried = [dict(peer.recommended), *settings_of(name, thresholds, steps)]
    return [options for index, options in enumerate(tried) if options not in tried[:index]]
