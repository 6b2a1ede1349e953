"""How many rows and jobs fit into the device's memory; whether the device has failed."""
