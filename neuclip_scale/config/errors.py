"""The one error of recipes."""

from __future__ import annotations


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the field, its value and the remedy."""

    def __init__(self, field_name: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{field_name} = {value!r}: {problem}. {remedy}")
        self.field_name, self.value, self.problem, self.remedy = field_name, value, problem, remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        # Errors of rank 0 travel pickled to the other ranks.
        return type(self), (self.field_name, self.value, self.problem, self.remedy)
