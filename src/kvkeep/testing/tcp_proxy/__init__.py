"""A network between a tier and its server that fails when a test says so."""

from kvkeep.testing.tcp_proxy.relay import FaultyRelay, NetworkFault, Towards

__all__ = ["FaultyRelay", "NetworkFault", "Towards"]
