"""A discrete-event simulation of the engine: the policies and the admission of
`stepweave.scheduling`, no model."""
