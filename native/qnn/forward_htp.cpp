// A libQnnHtp.so that passes everything on to a newer one.
//
// ExecuTorch 1.5 is built against Qualcomm's SDK 2.37. In one later than that, the union of an
// HTP device's custom configuration moved from byte 4 to byte 8 (it got a member of 8 bytes), so
// that creating a device fails with "unknown custom config socModel 0". This library takes the
// place of the newer one and creates devices with a configuration that either layout reads alike;
// everything else goes straight to the library that DOUBLEWEAVE_QNN_HTP names.
//
// The layouts are those of Qualcomm's public headers (QnnInterface.h, QnnDevice.h,
// QnnHtpDevice.h), written down as far as they are needed: the headers come with the SDK alone.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

using ErrorHandle = uint64_t;
constexpr ErrorHandle kNotSupported = 1000;  // QNN_COMMON_ERROR_NOT_SUPPORTED

// The newer table has at least as many entries; ExecuTorch knows those of 2.37.
constexpr int kNumEntries = 64;
constexpr int kDeviceCreate = 40;

struct Interface {
  uint32_t backend_id;
  const char* provider_name;
  uint32_t api_version[6];
  void* entries[kNumEntries];
};
static_assert(offsetof(Interface, entries) == 40);

struct DeviceConfig {
  uint32_t option;
  void* value;
};
constexpr uint32_t kCustomConfig = 0;

struct CustomConfigBefore {
  uint32_t option;
  uint32_t soc_model;
};
constexpr uint32_t kSocOption = 0;

struct CustomConfigOfEither {
  uint32_t option;
  uint32_t soc_model_before;
  uint64_t soc_model;
};

using DeviceCreate = ErrorHandle (*)(void* logger, const DeviceConfig** configs, void** device);
using GetProviders = ErrorHandle (*)(const Interface*** providers, uint32_t* num_providers);

DeviceCreate create_device = nullptr;

// Passes on the SoC alone: an emulated device takes the rest from it.
ErrorHandle device_create(void* logger, const DeviceConfig** configs, void** device) {
  CustomConfigOfEither custom = {kSocOption, 0, 0};
  bool is_found = false;
  for (; configs != nullptr && *configs != nullptr; ++configs) {
    if ((*configs)->option != kCustomConfig) {
      continue;
    }
    const auto* before = static_cast<const CustomConfigBefore*>((*configs)->value);
    if (before->option == kSocOption) {
      custom.soc_model_before = before->soc_model;
      custom.soc_model = before->soc_model;
      is_found = true;
    }
  }
  const DeviceConfig config = {kCustomConfig, &custom};
  const DeviceConfig* passed[] = {is_found ? &config : nullptr, nullptr};
  return create_device(logger, passed, device);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ErrorHandle
QnnInterface_getProviders(const Interface*** providers, uint32_t* num_providers) {
  static Interface forwarded;
  static const Interface* list[] = {&forwarded};
  const char* path = std::getenv("DOUBLEWEAVE_QNN_HTP");
  void* library = path == nullptr ? nullptr : dlopen(path, static_cast<int>(RTLD_NOW | RTLD_LOCAL));
  if (library == nullptr) {
    std::fprintf(stderr, "DOUBLEWEAVE_QNN_HTP: %s\n",
                 path == nullptr ? "not set; it names Qualcomm's libQnnHtp.so" : dlerror());
    return kNotSupported;
  }
  const auto get = reinterpret_cast<GetProviders>(dlsym(library, "QnnInterface_getProviders"));
  const Interface** found = nullptr;
  uint32_t num_found = 0;
  if (get == nullptr) {
    return kNotSupported;
  }
  if (const ErrorHandle error = get(&found, &num_found); error != 0) {
    return error;
  }
  if (num_found == 0) {
    return kNotSupported;
  }
  std::memcpy(&forwarded, found[0], sizeof(forwarded));
  create_device = reinterpret_cast<DeviceCreate>(forwarded.entries[kDeviceCreate]);
  forwarded.entries[kDeviceCreate] = reinterpret_cast<void*>(&device_create);
  *providers = list;
  *num_providers = 1;
  return 0;
}
