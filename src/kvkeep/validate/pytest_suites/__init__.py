r"""The suites as pytest tests, one file each under the name that the reference documents give it.

    pytest -p kvkeep.validate.pytest_suites.plugin --pyargs kvkeep.validate.pytest_suites \
        -m kvbm -s --kvkeep-stack stack.yaml

A CI may run them as they are, or copy them: the files need nothing but the plug-in and pytest.
"""
