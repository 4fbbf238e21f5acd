"""Keep Ray Serve's replicas on loopback; run in each of Ray's worker processes as it starts.

A replica takes calls from other replicas on a gRPC port that it opens on every interface, and no
setting changes that. It unpickles what arrives there, so other machines must not reach the port.
This is a separate module because a worker process imports it before anything else.
"""

LOOPBACK = "127.0.0.1"


def bind_replicas_to_loopback() -> None:
    """Let replicas listen on 127.0.0.1 only; Ray's `worker_process_setup_hook`.

    Raises:
        ImportError, AttributeError: a newer Ray has moved what this depends on. No replica is
            better than one that is open to the network.
    """
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server

    def listen_on_loopback(server: object, address: str) -> int:
        return int(listen(server, f"{LOOPBACK}:{address.rpartition(':')[2]}"))

    replica.add_port_to_grpc_server = listen_on_loopback
