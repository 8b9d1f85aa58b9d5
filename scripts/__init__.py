"""Set-up, demonstration and comparison programs; not part of the installed package."""
