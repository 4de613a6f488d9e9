"""Commands of the repository; a package, so that those which train can share modules. Not installed."""
