"""What every part uses: files that are written whole, folders that one process holds, errors as one line."""
