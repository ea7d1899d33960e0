# A door for npm, node-gyp and prebuildify: CMakeLists.txt is the one description of sources and flags.
{
  "targets": [
    {
      "target_name": "pyraflow",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake",
          "message": "Building the native addon with CMake",
          "inputs": [],
          # Never written, so that CMake is asked every time what is out of date.
          "outputs": ["<(INTERMEDIATE_DIR)/ask-cmake"],
          "action": ["node", "scripts/build-native.mjs"]
        }
      ]
    }
  ]
}
