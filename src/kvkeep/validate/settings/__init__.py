"""What a check does: values from flags, environment, stack file, scale and profile."""

from kvkeep.validate.settings.profiles import (
    PROFILES,
    REFERENCE_TEXT_URL,
    SCALES,
)
from kvkeep.validate.settings.resolution import heard, names_set, resolve
from kvkeep.validate.settings.tables import environment_table
from kvkeep.validate.settings.values import (
    DOCUMENTS,
    ENVIRONMENT,
    CheckSettings,
    Document,
    variables_of,
)

__all__ = [
    "DOCUMENTS",
    "ENVIRONMENT",
    "PROFILES",
    "REFERENCE_TEXT_URL",
    "SCALES",
    "CheckSettings",
    "Document",
    "environment_table",
    "heard",
    "names_set",
    "resolve",
    "variables_of",
]
