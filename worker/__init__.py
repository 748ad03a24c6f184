"""The GPU worker: RQ's parent and horse without torch, and one engine process that holds the warm model."""
