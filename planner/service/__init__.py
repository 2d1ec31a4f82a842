"""A world model over HTTP: WorldArena 2.0's v1 contract, a client, and a suite for anyone's server."""
