// SPDX-License-Identifier: Apache-2.0
#include <tqkv/tqkv.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <new>

#include "commands.hpp"

namespace {

// What a script can tell apart: 0 done, 1 refused or failed, 2 the command line was wrong.
constexpr int kFailed = 1, kUsage = 2;

int run(int argc, char **argv) {
  CLI::App app("Compressed key/value caches for language models: measure, check, plan.", "tqkv");
  auto build = tq_build{};
  build.struct_size = sizeof build;
  app.set_version_flag("--version", tq_build_info(&build) == TQ_OK ? std::string("tqkv ") + build.version : "tqkv");
  app.require_subcommand(1);
  app.get_formatter()->column_width(36);
  int exit_status = 0;
  tqkv_cli::add_demo(app);
  tqkv_cli::add_eval(app);
  tqkv_cli::add_validate(app, exit_status);
  tqkv_cli::add_plan(app);
  tqkv_cli::add_info(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError &e) {
    return app.exit(e) == 0 ? 0 : kUsage;
  }
  return exit_status;
}

}  // namespace

int main(int argc, char **argv) {
  int status = kFailed;
  try {
    status = run(argc, argv);
  } catch (const std::bad_alloc &) {
    std::fprintf(stderr, "tqkv: out of memory\n");
  } catch (const std::exception &e) {
    std::fprintf(stderr, "tqkv: %s\n", e.what());
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
    std::perror("tqkv: standard output");
    return kFailed;
  }
  return status;
}
