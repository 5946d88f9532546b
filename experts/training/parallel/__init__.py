"""Several workers that train one network inside one island."""
