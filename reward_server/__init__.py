"""Reward models, their training, and the gRPC service that scores with them."""
