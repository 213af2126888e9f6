"""Entry point of the plug-in: vLLM calls ``register`` once in every process it starts."""

NAME = "KvkeepConnector"


def register() -> None:
    """Make the connector known by name, and cartridges to the front-end; safe to call again.

    MultiConnector looks children up by their registered class name (vllm 0.32,
    multi_connector.py), so the name is registered even for users of the module path.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvkeep.connector.cartridges.insertion import install

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvkeep.connector.plugin", NAME)
    install()
