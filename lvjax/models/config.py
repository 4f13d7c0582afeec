# SPDX-License-Identifier: Apache-2.0
"""Sizes of the models, as frozen dataclasses that are static under jit, and Wan's own constants.

Sizes and dtypes only: no mesh, no paths, no method knobs.
"""

from dataclasses import dataclass

from lvjax.core.errors import InputError

WAN_VAE_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_VAE_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN_VAE_2_2_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN_VAE_2_2_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


DTYPES = ("float32", "bfloat16", "float16")  # of activations


def check(cfg, name: str, right: bool, words: str) -> None:
    """Raises: InputError naming a field that is not right, and in words what it may be."""
    if not right:
        given = getattr(cfg, name)
        raise InputError(f"{type(cfg).__name__}.{name} is {given!r}; give {words}")


def check_sizes(cfg, *names: str) -> None:
    """Raises: InputError for fields that are not whole numbers from 1."""
    for name in names:
        value = getattr(cfg, name)
        check(cfg, name, type(value) is int and 0 < value < 2**20, "a whole number from 1")


def check_real(cfg, name: str, low: float, high: float) -> None:
    """Raises: InputError for a field that is no number between two."""
    value = getattr(cfg, name)
    right = type(value) in (int, float) and low < value < high
    check(cfg, name, right, f"a number between {low:g} and {high:g}")


def _whole(values) -> tuple:
    """The values, if all are whole numbers from 1, else nothing."""
    right = isinstance(values, tuple) and all(type(v) is int and v > 0 for v in values)
    return values if right else ()


@dataclass(frozen=True)
class DiTConfig:
    """Wan's diffusion transformer.  Defaults are those every released Wan shares.

    condition_channels: channels beside the noise (mask and condition latents), through their own
      projection; 0 for text-to-video.
    image_dim: width of CLIP image tokens (1280 for Wan 2.1 I2V), None without the image branch.
    image_pos_len: rows of the learned position table of FLF2V's image tokens (514), 0 otherwise.
    dtype: activations; parameters keep their stored dtype.
    """

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    condition_channels: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None
    image_pos_len: int = 0
    freq_dim: int = 256
    theta: float = 10000.0
    eps: float = 1e-6
    dtype: str = "bfloat16"

    def __post_init__(self):
        sizes = ("dim", "num_heads", "num_layers", "ffn_dim", "in_channels", "out_channels")
        check_sizes(self, *sizes, "text_dim", "text_len", "freq_dim")
        check(self, "patch", len(_whole(self.patch)) == 3, "three whole numbers from 1")
        check_real(self, "theta", 1, 1e12)
        check_real(self, "eps", 0, 1)
        check(self, "dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        for name in ("condition_channels", "image_pos_len"):
            value = getattr(self, name)
            check(self, name, type(value) is int and 0 <= value < 2**20, "a whole number from 0")
        if self.image_dim is not None:
            check_sizes(self, "image_dim")
        even = self.dim % (2 * self.num_heads) == 0
        check(self, "dim", even, f"a multiple of {2 * self.num_heads}: heads of an even width")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """Wan's causal video autoencoder, of version 2.1 (the defaults) or 2.2 (`residual`).

    base: channels of the first stage; dim_mult: channels of each stage over base; a stage but the
      last halves the picture.
    temporal_down: for each halving, whether it also halves time.  patch: pixels folded into
      channels before the first layer.
    res_blocks: residual blocks per encoder stage (the decoder has one more).  mean, std:
      per-channel latent statistics.
    decoder_base: what `base` is in the decoder; None for the same.
    residual: every stage that changes the size of the video, and the encoder's last, stands beside
      a shortcut without parameters, and upsampling keeps the channels, which it halves otherwise.
    """

    base: int = 96
    z: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    mean: tuple[float, ...] = WAN_VAE_MEAN
    std: tuple[float, ...] = WAN_VAE_STD
    decoder_base: int | None = None
    residual: bool = False

    def __post_init__(self):
        check_sizes(self, "base", "z", "res_blocks", "patch")
        stages = len(_whole(self.dim_mult))
        check(self, "dim_mult", stages > 0, "whole numbers from 1, one per stage")
        down = isinstance(self.temporal_down, tuple) and len(self.temporal_down) == stages - 1
        check(self, "temporal_down", down, f"{stages - 1} of True or False")
        for name in ("mean", "std"):
            values = getattr(self, name)
            right = isinstance(values, tuple) and len(values) == self.z
            check(self, name, right, f"{self.z} values")
        if self.decoder_base is not None:
            check_sizes(self, "decoder_base")
        check(self, "residual", type(self.residual) is bool, "True or False")
        if self.residual:
            self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """Raises: InputError unless each shortcut's cells divide evenly among its channels."""
        cells = [8 if temporal else 4 for temporal in self.temporal_down]
        down, up = self.encoder_widths, self.decoder_widths[:-1]
        right = all(
            i * n % o == 0 for i, o, n in zip(down[:-1], down[1:], (*cells, 1), strict=True)
        ) and all(o * n % i == 0 for i, o, n in zip(up[:-1], up[1:], cells[::-1], strict=True))
        words = "multipliers that the shortcuts' averages and repetitions divide, as (1, 2, 4, 4)"
        check(self, "dim_mult", right, words)

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels into the encoder's first stage, and out of each."""
        return tuple(self.base * m for m in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels into the decoder's first stage, and out of the residual blocks of each."""
        base = self.decoder_base or self.base
        return tuple(base * m for m in (self.dim_mult[-1], *self.dim_mult[::-1]))

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell, each way."""
        return self.patch * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame but the first."""
        return 2 ** sum(self.temporal_down)


WAN_T2V_1_3B = DiTConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
WAN_T2V_14B = DiTConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
WAN_I2V_14B = DiTConfig(
    dim=5120, num_heads=40, num_layers=40, ffn_dim=13824, condition_channels=20, image_dim=1280
)
WAN_FLF2V_14B = DiTConfig(
    dim=5120,
    num_heads=40,
    num_layers=40,
    ffn_dim=13824,
    condition_channels=20,
    image_dim=1280,
    image_pos_len=514,
)
WAN_2_2_I2V_A14B = DiTConfig(
    dim=5120, num_heads=40, num_layers=40, ffn_dim=13824, condition_channels=20
)
WAN_2_2_TI2V_5B = DiTConfig(
    dim=3072, num_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48
)
WAN_VAE_2_1 = VAEConfig()
WAN_VAE_2_2 = VAEConfig(
    base=160,
    z=48,
    patch=2,
    mean=WAN_VAE_2_2_MEAN,
    std=WAN_VAE_2_2_STD,
    decoder_base=256,
    residual=True,
)
