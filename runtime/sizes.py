"""How many bytes a model takes in memory, and how many it reads for each token."""

from __future__ import annotations

from collections.abc import Sequence

from formats.container import TritFile
from formats.kv_modules import KVModule

from .config import ModelConfig
from .ring.cache import KVRing


def weight_bytes(file: TritFile) -> int:
    """Bytes of all tensors but the tokenizer's."""
    return sum(t.nbytes for t in file.tensors.values() if not t.name.startswith("tokenizer."))


def weight_bytes_per_token(file: TritFile, config: ModelConfig) -> int:
    """Bytes of weights that decoding a token reads: all, but of untied embeddings only one row."""
    total = weight_bytes(file)
    if not config.tied_embeddings:
        embeddings = file.tensors["tok_embeddings"]
        total -= embeddings.nbytes - embeddings.nbytes // embeddings.shape[0]
    return total


def weights_per_token(file: TritFile, config: ModelConfig) -> int:
    """Weights of the matrices that decoding a token multiplies with: all, but not untied embeddings."""
    matrices = [t for t in file.tensors.values() if len(t.shape) == 2 and not t.name.startswith("tokenizer.")]
    return sum(t.shape[0] * t.shape[1] for t in matrices if config.tied_embeddings or t.name != "tok_embeddings")


def scratch_bytes(config: ModelConfig, n_batch: int) -> int:
    """Bytes of the buffers that the forward pass fills for a chunk of n_batch tokens, and of a token's logits.

    They are the run state's, and as much again at most for what products and attention lay aside."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    numbers = 2 * config.dim + 3 * q_dim + 2 * kv_dim + 2 * config.hidden_dim
    return 4 * (2 * n_batch * numbers + config.vocab_size)


def kv_bytes_per_token(config: ModelConfig, codec: str = "f16", modules: Sequence[KVModule] = ()) -> int:
    """Bytes of keys and values that the ring keeps of one token. modules: the model's learned projections"""
    ring = KVRing(config, 2, chunk=1, sinks=0, codec=codec, modules=modules)
    return ring.nbytes // ring.slots
