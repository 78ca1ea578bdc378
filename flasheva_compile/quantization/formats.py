"""The named formats of a quantised cache: how many bits a key and a value are stored in."""

from __future__ import annotations

from dataclasses import dataclass

from flasheva_compile.errors import ConfigError

FP8 = "fp8"
EXACT = "exact"  # in the model's dtype
_BYTE = 8
_WIDEST = 12  # bits of a code


@dataclass(frozen=True, slots=True)
class CodeFormat:
    """``d{vector}b{bits}``: ``vector`` neighbouring channels become one code of ``bits`` bits.

    Attributes:
        vector: Channels per code.
        bits: Bits per code, at most 12.
    """

    vector: int
    bits: int

    @property
    def entries(self) -> int:
        """Codewords of a codebook."""
        return 1 << self.bits

    @property
    def multiple(self) -> int:
        """What a head's channels have to be a multiple of."""
        return self.vector

    def codes(self, size: int) -> int:
        """Return the codes of one token of ``size`` channels.

        Raises:
            ConfigError: ``size`` is no multiple of the vector's length.
        """
        if size % self.multiple:
            message = f"{size} channels are no multiple of {self.multiple}"
            hint = "choose a format with shorter vectors, or leave the layer as it is"
            raise ConfigError(message, subject="head_dim", hint=hint)
        return size // self.vector

    def nbytes(self, size: int) -> int:
        """Return the bytes of one token of ``size`` channels: 12-bit codes are packed in pairs."""
        count = self.codes(size)
        return count if self.bits <= _BYTE else -(-count // 2) * 3

    def __post_init__(self) -> None:
        if self.vector < 1 or not 1 <= self.bits <= _WIDEST:
            message = f"d{self.vector}b{self.bits}: vectors of 1 or more, codes of 1 to 12 bits"
            raise ConfigError(message, subject="format")

    def __str__(self) -> str:
        return f"d{self.vector}b{self.bits}"


@dataclass(frozen=True, slots=True)
class WordFormat:
    """``w{vector}``: ``vector`` channels share a word of 16 bits; which has how many is learned.

    Attributes:
        vector: Channels per word.
    """

    vector: int

    @property
    def multiple(self) -> int:
        """What a head's channels have to be a multiple of."""
        return 2 * self.vector

    def codes(self, size: int) -> int:
        """Return the words of one token of ``size`` channels: an even number.

        Raises:
            ConfigError: ``size`` is no multiple of two words.
        """
        if size % self.multiple:
            message = f"{size} channels are no multiple of {self.multiple}"
            hint = "choose a format of codebooks, or leave the layer as it is"
            raise ConfigError(message, subject="head_dim", hint=hint)
        return size // self.vector

    def nbytes(self, size: int) -> int:
        """Return the bytes of one token of ``size`` channels."""
        return 2 * self.codes(size)

    def __post_init__(self) -> None:
        if self.vector not in _FIELDS:
            message = f"w{self.vector}: words have {_FIELDS} channels"
            raise ConfigError(message, subject="format")

    def __str__(self) -> str:
        return f"w{self.vector}"


_FIELDS = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How keys and values are stored as codes of codebooks.

    Attributes:
        key: Of keys.
        value: Of values.
    """

    key: CodeFormat
    value: CodeFormat

    def nbytes(self, head_dim: int, value_dim: int) -> int:
        """Return the bytes of one token and kv head, key and value."""
        return self.key.nbytes(head_dim) + self.value.nbytes(value_dim)


@dataclass(frozen=True, slots=True)
class WordKvFormat:
    """How keys and values are stored by transform coding.

    Attributes:
        key: Of keys.
        value: Of values.
    """

    key: WordFormat
    value: WordFormat

    def nbytes(self, head_dim: int, value_dim: int) -> int:
        """Return the bytes of one token and kv head, key and value."""
        return self.key.nbytes(head_dim) + self.value.nbytes(value_dim)


# Source of all but 4 bits (which is arithmetic): VecInfer, arXiv 2510.06175.
FORMATS: dict[str, KvFormat | WordKvFormat] = {
    "vq-4bit": KvFormat(CodeFormat(2, 8), CodeFormat(2, 8)),
    "vq-2bit": KvFormat(CodeFormat(4, 8), CodeFormat(4, 8)),
    "vq-1.5bit": KvFormat(CodeFormat(8, 12), CodeFormat(8, 12)),
    "vq-1.25bit": KvFormat(CodeFormat(8, 12), CodeFormat(8, 8)),
    "vq-1bit": KvFormat(CodeFormat(8, 8), CodeFormat(8, 8)),
    # Ours: transform coding.
    "tc-4bit": WordKvFormat(WordFormat(4), WordFormat(4)),
    "tc-3bit": WordKvFormat(WordFormat(4), WordFormat(8)),
    "tc-2bit": WordKvFormat(WordFormat(8), WordFormat(8)),
}


def kv_format(name: object) -> KvFormat | WordKvFormat:
    """Return a format of codebooks or of transform coding by its name.

    Raises:
        ConfigError: There is none of this name.
    """
    if not isinstance(name, str) or name not in FORMATS:
        message = f"{name!r} is not one of {', '.join(map(repr, FORMATS))}"
        raise ConfigError(message, subject="format")
    return FORMATS[name]


def misfit_of_heads(form: KvFormat | WordKvFormat, head_dim: int, value_dim: int) -> str:
    """Return why heads cannot be stored in a format; "" = they can."""
    for name, part, size in (("keys", form.key, head_dim), ("values", form.value, value_dim)):
        if size % part.multiple:
            return f"{name} have {size} channels, no multiple of {part.multiple}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStorage:
    """How a full layer's cache is stored.

    The first tokens and the last ones stay in the model's dtype. What leaves the last ones is
    quantised; that happens ``block_tokens`` at a time, so that between ``exact_tokens`` and
    ``exact_tokens + block_tokens - 1`` of them are exact.

    Attributes:
        format: A name of :data:`FORMATS`, or "fp8".
        sink_tokens: First tokens that stay exact.
        exact_tokens: Last tokens that stay exact, at least.
        block_tokens: Tokens that leave together.
        lookup: Compute scores from tables of the query's products with the codewords, instead of
            decoding keys. The same numbers but for rounding.
    """

    format: str
    sink_tokens: int = 16
    exact_tokens: int = 128
    block_tokens: int = 128
    lookup: bool = False

    def __post_init__(self) -> None:
        if self.format != FP8:
            known = (FP8, *FORMATS)
            if self.format not in FORMATS:
                message = f"{self.format!r} is not one of {', '.join(map(repr, known))}"
                raise ConfigError(message, subject="full_layers")
        if self.lookup and not isinstance(FORMATS.get(self.format), KvFormat):
            raise ConfigError(f"{self.format} has no codewords to look up", subject="lookup")
        least = {"sink_tokens": 0, "exact_tokens": 1, "block_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                message = f"must be an integer of at least {smallest}, got {value!r}"
                raise ConfigError(message, subject=name)

    @classmethod
    def of(cls, value: object) -> KvStorage:
        """Read a format's name, or return a ``KvStorage`` as it is.

        Raises:
            ConfigError: It is neither.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            message = f"must be a format's name or a KvStorage, got {value!r}"
            raise ConfigError(message, subject="full_layers")
        return cls(format=value)
