"""HTTP doors to the scorer that gRPC serves, in the shapes that other trainers already send."""
