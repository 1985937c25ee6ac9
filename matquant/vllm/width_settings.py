"""Settings of the server's bit-widths, from vLLM's ``--additional-config '{"matquant": {...}}'``. Works without vLLM.

{"matquant": {"model_bits": {"llama-3bit": 3}, "policy": {"bits": [8, 4, 3]}}}
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from matquant.errors import UserError
from matquant.formats.bits import MIN_BITS, check_bits

SECTION = "matquant"
SPECULATION = ("adaptive", "always")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicySettings:
    """Bit-widths by load, of requests that do not name one. See ``width_policy.LoadPolicy``.

    Attributes:
        bits: bit-widths to choose from, falling. The first is that of an idle server.
        lower_at_waiting, lower_at_cache: number of waiting requests, and used share of the KV cache, from which on the next
            lower bit-width is chosen.
        raise_at_waiting, raise_at_cache: both must be no more than these for the next higher bit-width.
        hold_seconds: shortest time between two changes, and how long the load must be low before the bit-width rises.
    """

    bits: tuple[int, ...]
    lower_at_waiting: int = 16
    raise_at_waiting: int = 2
    lower_at_cache: float = 0.9
    raise_at_cache: float = 0.6
    hold_seconds: float = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WidthSettings:
    """Settings of one server.

    Attributes:
        max_bits: largest bit-width that the resident planes hold.
        model_bits: bit-width of requests by the served model name that they contain.
        policy: bit-widths by load; None if the server's choice changes only by ``/v1/matquant/bits``.
        draft_bits: bit-width of a draft model that is the same checkpoint.
        speculation: ``adaptive`` leaves drafts out where that is measured to be faster, ``always`` does not.
    """

    max_bits: int
    model_bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    policy: PolicySettings | None = None
    draft_bits: int = MIN_BITS
    speculation: str = SPECULATION[0]

    @classmethod
    def from_config(cls, additional_config: object, max_bits: int) -> "WidthSettings":
        """Checked settings from vLLM's ``additional_config``. Raises UserError."""
        section = additional_config.get(SECTION, {}) if isinstance(additional_config, Mapping) else {}
        given = _fields(section, SECTION, ("model_bits", "policy", "draft_bits", "speculation"))
        names = given.get("model_bits", {})
        if not isinstance(names, Mapping):
            raise UserError(f"{SECTION}.model_bits must be an object of model names and bit-widths; found {names!r}.")
        model_bits = {str(name): check_bits(bits, f"model_bits of {name}", max_bits) for name, bits in names.items()}
        policy = given.get("policy")
        return cls(
            max_bits=max_bits,
            model_bits=model_bits,
            policy=None if policy is None else _policy(policy, max_bits),
            speculation=_speculation(given.get("speculation", SPECULATION[0])),
            draft_bits=check_bits(given.get("draft_bits", MIN_BITS), f"{SECTION}.draft_bits", max_bits),
        )

    def check_bits(self, bits: object, name: str = "bits") -> int:
        """Return a bit-width that a request names. Raises UserError if it is none, or the planes do not hold it."""
        return check_bits(bits, name, self.max_bits, "the planes that this server keeps")

    def request_bits(self, bits: object, model: object) -> int | None:
        """Bit-width of a request; None for that of the server.

        Args:
            bits: what the request names; None for nothing.
            model: the model name that it contains.

        Raises:
            UserError: ``bits`` is no bit-width that the planes hold.
        """
        if bits is not None:
            return self.check_bits(bits)
        return self.model_bits.get(model) if isinstance(model, str) else None


def _speculation(value: object) -> str:
    if value not in SPECULATION:
        raise UserError(f"{SECTION}.speculation must be one of {', '.join(SPECULATION)}; found {value!r}.")
    return str(value)


def _policy(content: object, max_bits: int) -> PolicySettings:
    where = f"{SECTION}.policy"
    given = _fields(content, where, [field.name for field in dataclasses.fields(PolicySettings)])
    bits = given.pop("bits", None)
    if not isinstance(bits, Sequence) or isinstance(bits, str) or len(bits) < 2:
        raise UserError(f"{where}.bits must be a list of two or more bit-widths, the highest first; found {bits!r}.")
    ladder = tuple(check_bits(value, f"{where}.bits", max_bits) for value in bits)
    if list(ladder) != sorted(set(ladder), reverse=True):
        raise UserError(f"{where}.bits must fall from the first to the last; found {list(ladder)}.")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UserError(f"{where}.{name} must be a number from 0; found {value!r}.")
    settings = PolicySettings(bits=ladder, **given)
    for kind in ("waiting", "cache"):
        low, high = getattr(settings, f"raise_at_{kind}"), getattr(settings, f"lower_at_{kind}")
        if low >= high:
            raise UserError(
                f"{where}.raise_at_{kind} must be less than lower_at_{kind}, else the bit-width would rise and fall at the "
                f"same load; found {low} and {high}."
            )
    return settings


def _fields(content: object, where: str, known: Sequence[str]) -> dict[str, Any]:
    """Content of an object of the settings. Raises UserError for another type or an unknown name."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where} in --additional-config must be an object; found {content!r}.")
    if unknown := [str(name) for name in content if name not in known]:
        raise UserError(f"{where} in --additional-config has no setting {unknown[0]}; there are {', '.join(known)}.")
    return dict(content)
