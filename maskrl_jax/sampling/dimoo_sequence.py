"""Lumina-DiMOO's sequence of text to image (specs/lumina_dimoo.md sections 2, 3 and 9): prompt, then one image.

    prompt | BOA BOI | rows of image tokens, each followed by a newline | EOI EOA

Prompts are padded on the left, so that the image part has the same array indices in every row and in both branches of
guidance; position ids count from the first real token. Axes: B batch, N image tokens, P padded prompt, M image part,
L = P + M.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# <system>Generate an image according to the text prompt.</system><user><uncondition></user>
UNCONDITIONAL = (126332, 36289, 289, 3972, 4631, 297, 268, 3019, 12166, 13, 126333, 126334, 126351, 126335)
SPECIALS = ("mask", "newline", "boa", "boi", "eoi", "eoa")


class Prompt(flax.struct.PyTreeNode):
    """Left-padded prompts: what a sampler knows as the condition. One prompt lacks the axis B."""

    ids: Array  # int32 [B, P]
    real: Array  # bool [B, P], False marks padding


def left_padded(prompts: Sequence[Sequence[int]], multiple: int = 64) -> Prompt:
    """Pad token ids to the next multiple of a length (numpy arrays); pad the unconditional prompt with the others.

    Raises ValueError where there is no prompt, or one without tokens.
    """
    if not prompts or not min(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token, and a batch one prompt")
    length = -(-max(len(prompt) for prompt in prompts) // multiple) * multiple
    ids, real = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], real[row, length - len(prompt) :] = prompt, True
    return Prompt(ids, real)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The image part of one size; ids are the published vocabulary's."""

    height: int  # tokens, 1/16 of the pixels
    width: int
    mask: int = 126_336
    newline: int = 126_084
    boa: int = 126_354
    boi: int = 126_349
    eoi: int = 126_350
    eoa: int = 126_355
    code_offset: int = 126_356  # token id of image code 0
    codebook_size: int = 8192  # K; a sampler's MASK is the code K

    def __post_init__(self):
        if min(self.height, self.width, self.codebook_size) < 1:
            raise ValueError(f"a grid of {self.height} x {self.width} with {self.codebook_size} codes has no image")
        for name in SPECIALS:
            if 0 <= getattr(self, name) - self.code_offset < self.codebook_size:
                raise ValueError(f"{name} {getattr(self, name)} is the id of an image code")

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """M = N + height + 4."""
        return self.num_tokens + self.height + 4

    @property
    def places(self) -> np.ndarray:
        """Where the image tokens lie in the image part, int32 [N], row-major."""
        rows, columns = np.divmod(np.arange(self.num_tokens, dtype=np.int32), self.width)
        return 2 + rows * (self.width + 1) + columns

    @property
    def empty(self) -> np.ndarray:
        """The image part of nothing but MASK, int32 [M]."""
        rows = [self.mask] * self.width + [self.newline]
        return np.asarray([self.boa, self.boi, *rows * self.height, self.eoi, self.eoa], np.int32)

    def sequence(self, codes_BN: Array, prompt: Prompt) -> tuple[Array, Array, Array]:
        """Whole sequences: ids int32 [B,L], positions int32 [B,L] and whether a token is real, bool [B,L].

        Codes are 0..K-1 or MASK = K; another one becomes an id that no vocabulary has, so that a model gives NaN.
        """
        batch = len(codes_BN)
        image_BM = jnp.tile(self.empty[None], (batch, 1)).at[:, self.places].set(self.token_ids(codes_BN))
        ids_BL = jnp.concatenate([jnp.asarray(prompt.ids), image_BM], axis=1)
        real_BL = jnp.pad(jnp.asarray(prompt.real), ((0, 0), (0, self.length)), constant_values=True)
        return ids_BL, positions(real_BL), real_BL

    def token_ids(self, codes: Array) -> Array:
        """Ids of image codes; MASK's for K, -1 for what is no code."""
        known = (codes >= 0) & (codes < self.codebook_size)
        return jnp.where(known, codes + self.code_offset, jnp.where(codes == self.codebook_size, self.mask, -1))

    def image(self, x_BLD: Array) -> Array:
        """Take the image tokens' rows of a whole sequence, [B,L,...] -> [B,N,...]."""
        return x_BLD[:, x_BLD.shape[1] - self.length :][:, self.places]

    def image_first(self, x_BLD: Array) -> Array:
        """The rows of a whole sequence in another order, [B,L,...]: the image tokens', then all others as they come."""
        length = x_BLD.shape[1]
        image = length - self.length + self.places
        others = np.setdiff1d(np.arange(length), image)
        return x_BLD[:, np.concatenate([image, others])]

    def codes(self, ids_BL: Array) -> Array:
        """Codes int32 [B,N] of whole sequences, K where one is MASK: the inverse of `sequence`."""
        ids_BN = self.image(ids_BL)
        return jnp.where(ids_BN == self.mask, self.codebook_size, ids_BN - self.code_offset)


def positions(real_BL: Array) -> Array:
    """Position ids int32 [B,L]: 0 at the first real token, and at the padding before it."""
    return jnp.maximum(jnp.cumsum(real_BL, axis=1, dtype=jnp.int32) - 1, 0)
