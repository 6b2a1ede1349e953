"""What is loaded beside a model: ControlNets, adapters for images, textual inversions."""
