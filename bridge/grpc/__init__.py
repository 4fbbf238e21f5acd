"""The five gRPC services of bridge/grpc/protos, on workflows, graph, cache and agents.

`protos/` holds the contracts, unchanged, because other systems use them; `wire/` is the code that
`make protos` generates from them. A servicer has no state: it converts proto -> model -> Temporal
or graph -> proto. Its exceptions become a status in one place (`bridge.grpc.errors`), callers are
identified in one place (`bridge.grpc.auth`), and `bridge.grpc.server` applies both to every method.
"""
