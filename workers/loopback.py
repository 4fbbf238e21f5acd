"""Keep Ray Serve's replicas on loopback; run in each of Ray's worker processes as it starts.

A replica takes calls from other replicas on a gRPC port that it opens on every interface, with no
setting for it. What arrives there is unpickled, so on a machine with others near it that must not
be. Alone in a module: a worker process imports it before anything else.
"""

LOOPBACK = "127.0.0.1"


def bind_replicas_to_loopback() -> None:
    """Ray's `worker_process_setup_hook`: replicas listen on 127.0.0.1 only.

    Raises ImportError or AttributeError where a newer Ray has moved what this rests on: better no
    replica than one that is open to the network.
    """
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server

    def listen_on_loopback(server: object, address: str) -> int:
        return int(listen(server, f"{LOOPBACK}:{address.rpartition(':')[2]}"))

    replica.add_port_to_grpc_server = listen_on_loopback
