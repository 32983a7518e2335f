"""The Open Inference Protocol over gRPC, health checks and reflection."""
