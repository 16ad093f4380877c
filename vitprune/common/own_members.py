"""Bases of public classes of which `help` and `dir` show what vitprune defines, and nothing inherited.

Otherwise `help(vitprune)` would be four fifths torch.nn.Module and pydantic. Instances list everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import cleandoc
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from vitprune.common.formatting import close_match, first_fault, flattened
from vitprune.errors import UsageError


class _OwnMembers(type):
    def __dir__(cls) -> list[str]:
        own = [base for base in cls.__mro__ if base.__module__.startswith("vitprune")]
        return sorted({name for base in own for name in vars(base) if not name.startswith("_")} | {"__init__"})


class PublicModule(nn.Module, metaclass=_OwnMembers):
    """A torch module."""

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._parameters, *self._buffers, *self._modules})


class _OwnFields(_OwnMembers, type(BaseModel)):  # type: ignore[misc]  # pydantic's has no public name
    def __call__(cls, *args: Any, **settings: Any) -> Any:
        try:
            return super().__call__(*args, **settings)
        except ValidationError as error:
            raise cls._refusal(error, settings) from error


class PublicSettings(BaseModel, metaclass=_OwnFields):  # type: ignore[metaclass]
    """Frozen settings, refused by a UsageError; the docstring of a class lists its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    _elsewhere: ClassVar[Mapping[str, str]] = {}
    """What other tools call a setting."""

    @classmethod
    def _title(cls, settings: Mapping[str, Any]) -> str:
        """What these settings are, for a sentence."""
        return cls.__name__

    @classmethod
    def _unknown(cls, name: str, settings: Mapping[str, Any]) -> UsageError:
        """There is no setting of this name."""
        known = sorted({*flattened(cls().model_dump()), *cls.model_fields} - {name})
        within = (each for each in known if each.endswith(f".{name}"))
        close = cls._elsewhere.get(name) or next(within, None) or close_match(name, known)
        return UsageError(
            f"{cls._title(settings)} has no setting '{name}'",
            f"did you mean {close}?" if close else f"choose from {', '.join(known)}",
        )

    @classmethod
    def _refusal(cls, error: ValidationError, settings: Mapping[str, Any]) -> UsageError:
        """What is wrong with the first setting that is, and the way out."""
        fault = error.errors()[0]
        path = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            return cls._unknown(path, settings)
        got = f", got {fault['input']!r}" if path else ""
        what = first_fault(error).replace("Input should be", "expected")
        return UsageError(f"{cls._title(settings)}: {what}{got}", "vitprune sparsify --print-config lists them")

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            way = "make other ones: a Recipe's with_settings({...}) gives it with some replaced"
            raise UsageError(f"{name} of a {type(self).__name__} cannot change once it is made", way) from error

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        fields = [
            f"    {name}: {field.description}; default {field.get_default(call_default_factory=True)}"
            for name, field in cls.model_fields.items()
            if field.description
        ]
        cls.__doc__ = "\n".join([cleandoc(cls.__doc__ or ""), "", "Attributes:", *fields])
