// SPDX-License-Identifier: Apache-2.0
// One function per subcommand: it adds itself to the command line. When chosen it runs, and throws Error or, where
// it can fail without one, sets the exit status.
#pragma once

#include <CLI/CLI.hpp>

namespace tqkv_cli {

void add_demo(CLI::App &app);
void add_eval(CLI::App &app);
void add_validate(CLI::App &app, int &exit_status);
void add_plan(CLI::App &app);
void add_info(CLI::App &app);

}  // namespace tqkv_cli
