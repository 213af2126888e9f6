"""How Hypothesis runs here: no limit per example, for a busy machine is no defect of the code."""

from hypothesis import settings

settings.register_profile("kvkeep", deadline=None, print_blob=True)
settings.load_profile("kvkeep")
