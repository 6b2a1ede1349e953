"""A discrete-event simulation of the engine without a model, with the server's policies and
admission."""
