"""What this machine has (``facts``) and how fast it is (``probes``): read and measured, nothing assumed."""
