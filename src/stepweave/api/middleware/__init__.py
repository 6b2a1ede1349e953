"""What every request passes through, one concern a module; `contract` puts them in order."""
