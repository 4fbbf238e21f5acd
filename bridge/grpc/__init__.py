"""The five gRPC services of shared/contracts, on the real thing: workflows, graph, cache, agents.

`protos/` holds the contracts, other people's wire, to the letter; `wire/` is the code that set-up
makes of them. A servicer has no state: proto -> model -> Temporal or graph -> proto. What it
raises becomes a status in one place (`bridge.grpc.errors`), who calls is known in one place
(`bridge.grpc.access`), and `bridge.grpc.server` puts both round every method.
"""
