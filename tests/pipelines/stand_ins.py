"""Tiny components with drawn weights, and inputs, in place of what a hub would give."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH = 16
"""Of every text encoder's tokens."""
TEXT = 6
"""Tokens of given prompt embeddings."""

M = TypeVar("M", bound=nn.Module)


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal values of that shape, always the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int, height: int, width: int, batch: int = 1) -> Tensor:
    """Pictures [batch, 3, height, width] in 0..1."""
    return drawn(seed, batch, 3, height, width).sigmoid()


def mask(height: int, width: int, batch: int = 1) -> Tensor:
    """Masks [batch, 1, height, width] with ones, to be painted, on the right half."""
    ones = torch.ones(batch, 1, height, width)
    ones[..., : width // 2] = 0
    return ones


def draw_weights_(module: M, seed: int = 0) -> M:
    """Draw every parameter anew, those that start at zero too, and set the module to eval."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                values *= parameter[0].numel() ** -0.5
            elif name.endswith("weight"):  # of a norm
                values = 1 + 0.1 * values
            else:
                values *= 0.1
            parameter.copy_(values)
    return module.eval()


def tiny(make: Callable[..., M], seed: int = 0, **config: Any) -> M:
    """``make(**config)`` with drawn weights; its buffers are equal every time, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make(**config)
    return draw_weights_(module, seed)


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder(latent_channels: int = 4, seed: int = 10, **config: Any) -> AutoencoderKL:
    """Pictures of 3 channels to latents of half their height and width."""
    return tiny(
        AutoencoderKL,
        seed,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        **config,
    )


CLIP_TOKENS = ["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "abcdefghij"), "a", "b"]


def clip_tokenizer(length: int = 8) -> CLIPTokenizer:
    """Reads prompts of single letters a to j, ``length`` tokens at most."""
    vocab = {piece: i for i, piece in enumerate(CLIP_TOKENS)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def clip_encoder(
    seed: int = 11, projected: bool = False, width: int = WIDTH, length: int = 8
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """For ``clip_tokenizer``."""
    config = CLIPTextConfig(
        vocab_size=len(CLIP_TOKENS),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return from_config(CLIPTextModelWithProjection if projected else CLIPTextModel, config, seed)


def t5_tokenizer(length: int = 8) -> T5Tokenizer:
    """Reads letters a to j."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = [*special, ("▁", -2.0), *((c, -3.0) for c in "abcdefghij")]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def t5_encoder(seed: int = 12, width: int = WIDTH) -> T5EncoderModel:
    """For ``t5_tokenizer``."""
    config = T5Config(
        vocab_size=14, d_model=width, d_kv=8, d_ff=width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return from_config(T5EncoderModel, config, seed)


def byte_tokenizer(length: int = 64, special: tuple[str, ...] = ()) -> Qwen2Tokenizer:
    """Reads any text byte by byte; 256 bytes, the end of text, then the special tokens."""
    pieces = [*bytes_to_unicode().values(), "<|endoftext|>", *special]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=length
    )
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def from_config(cls: type[PreTrainedModel], config: Any, seed: int = 11) -> PreTrainedModel:
    """A transformers model with drawn weights."""
    return tiny(cls, seed, config=config)
