"""Generated from bridge/grpc/protos by `make protos`."""
