"""Entry point of the plug-in: vLLM calls ``register`` once in every process it starts."""

NAME = "KvkeepConnector"


def register() -> None:
    """Make the connector known by name; safe to call again.

    MultiConnector looks children up by their registered class name (vllm 0.32,
    multi_connector.py), so the name is registered even for users of the module path.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvkeep.connector.plugin", NAME)
