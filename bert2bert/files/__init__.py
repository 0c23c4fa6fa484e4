"""Files of any kind, without knowing what a checkpoint is: torch archives, zip records, digests, disks, locks."""
