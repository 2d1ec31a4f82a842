"""What every room stands on: types, protocols, errors, datasets, results. numpy and the standard library only."""
