"""HTTP front end and the job contract. Never imports torch, the model or the worker (the CLI excepted)."""
