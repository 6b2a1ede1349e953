"""The command line: `stepweave serve | generate | models | doctor`."""
