"""Bases of public classes of which `help` and `dir` show what vitprune defines, and nothing inherited.

Otherwise `help(vitprune)` would be four fifths torch.nn.Module and pydantic. Instances list everything.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn


class _OwnMembers(type):
    def __dir__(cls) -> list[str]:
        own = [base for base in cls.__mro__ if base.__module__.startswith("vitprune")]
        return sorted({name for base in own for name in vars(base) if not name.startswith("_")} | {"__init__"})


class PublicModule(nn.Module, metaclass=_OwnMembers):
    """A torch module."""

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._parameters, *self._buffers, *self._modules})


class _OwnFields(_OwnMembers, type(BaseModel)):  # type: ignore[misc]
    pass  # pydantic's metaclass has no public name


class PublicSettings(BaseModel, metaclass=_OwnFields):  # type: ignore[metaclass]
    """Frozen settings; the docstring of a class lists its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        fields = [
            f"    {name}: {field.description}; default {field.get_default(call_default_factory=True)}"
            for name, field in cls.model_fields.items()
            if field.description
        ]
        cls.__doc__ = "\n".join([cleandoc(cls.__doc__ or ""), "", "Attributes:", *fields])
